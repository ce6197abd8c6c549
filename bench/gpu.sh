#!/usr/bin/env bash
# Everything a GPU should be asked, in under nine minutes:
#
#   bench/gpu.sh OUT_DIR            with the Python of .venv, or of PYTHON=...
#
# Each part has a time limit and a log; one that fails does not stop the others. OUT_DIR gets summary.txt (parts, exit
# codes, seconds), the figures as JSON, pictures, a trace and all logs in one file. The exit code is that of the worst.
set -u
[ $# -eq 1 ] || { echo "usage: bench/gpu.sh OUT_DIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$ROOT/.venv/bin/python" || command -v python3)}
LINKS=$(mktemp -d)
trap 'rm -rf "$LINKS"' EXIT
if ! "$PYTHON" -c 'import synco_fast.kernels' 2>/dev/null; then
  # A checkout that is not installed: the folders linked into one package, as setup.py maps them.
  mkdir "$LINKS/synco_fast"
  ln -s "$ROOT"/synco_fast/* "$LINKS/synco_fast/"
  for folder in kernels data bench; do ln -s "$ROOT/$folder" "$LINKS/synco_fast/$folder"; done
  export PYTHONPATH="$LINKS${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
  || { echo "error: found no CUDA device, or no PyTorch that sees one, expected at least one" >&2; exit 2; }
SYNCO=("$PYTHON" -m synco_fast)
WORST=0
: > "$OUT/summary.txt"
: > "$OUT/logs.txt"

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  printf '\n===== %s: %s\n' "$name" "$*" >> "$OUT/logs.txt"
  timeout --kill-after=10 "$limit" "$@" >> "$OUT/logs.txt" 2>&1
  code=$?
  [ "$code" -gt "$WORST" ] && WORST=$code
  printf '%-22s exit %-3s %4d s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$OUT/summary.txt"
}

"$PYTHON" - > "$OUT/environment.txt" <<'PY'
import json
from synco_fast.runtime.environment import describe_environment
print(json.dumps(describe_environment(), indent=1))
PY
nvidia-smi >> "$OUT/environment.txt" 2>&1

# The shape that matters first, in case the time ends early.
part "head, B = 256" 80 "${SYNCO[@]}" bench loss --rows 256 --length 65536 --json "$OUT/head-256.json"
part "profile of the loss" 25 "${SYNCO[@]}" profile loss --trace "$OUT/loss-trace.json.gz" --json "$OUT/head-profile.json"
part "tests" 100 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1) \
    && [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    part "$tool" 30 "$sanitizer" --tool "$tool" --error-exitcode 9 "${SYNCO[@]}" validate --backends triton \
      --dtypes bfloat16 --rows 5 --length 1000 --dim 64 --hard 40 --device cuda
  done
else
  echo "compute-sanitizer      not found" | tee -a "$OUT/summary.txt"
fi
part "validate" 40 "${SYNCO[@]}" validate --device cuda --json "$OUT/validate.json"
part "momentum" 25 "$PYTHON" -m pytest -q -p no:cacheprovider bench/suites/test_momentum.py \
  --benchmark-json "$OUT/momentum.json"
part "head, all shapes" 75 "${SYNCO[@]}" bench loss --backends released reference blockwise triton --repeats 20 \
  --json "$OUT/loss.json" --plot "$OUT/loss.png"
part "training step" 60 "${SYNCO[@]}" bench step --config synco-r50-200 --subjects encoder synco moco \
  --engines eager graph --steps 10 --rounds 1 --json "$OUT/step.json"
part "data" 60 "${SYNCO[@]}" bench data --device cuda --batch 256 --seconds 4 --rounds 2 --json "$OUT/data.json"
gzip -f "$OUT/logs.txt"
cat "$OUT/summary.txt"
exit "$WORST"
