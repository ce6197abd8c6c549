#!/usr/bin/env bash
# Check, time and tune the kernels on a GPU in nine minutes.
#
#   bench/gpu.sh [--stage NAME]... [--cache FILE]... [--dry] OUT_DIR
#
# Runs from a checkout that is not installed, with the Python of .venv or PYTHON=... It needs PyTorch and Triton, but not
# pydantic. The stages run in this order. Each has a time limit, and a failure does not stop the others. Should the timed
# ones take long, the last of them get less, so that the tests have their time:
#
#   stages      each launch of the loss against float64, one process for each dtype
#   launches    microseconds of each launch in a CUDA graph
#   variants    tuning variants of the launches
#   norm        the batch norm kernels
#   ncu         Nsight Compute on each launch, if installed
#   compare     the loss by backend, and the selection alone
#
# and, beside each other, since they time nothing:
#
#   tests       the GPU tests; without pydantic those of the kernels only
#   sanitizers  memcheck, initcheck and racecheck on one small call, if compute-sanitizer is installed
#   train       the demo run, which makes its own images; needs pydantic
#
# Two stages run only if named: `step`, the training step by backend and engine, and `data`, the pipelines on drawn photos
# and a ResNet-50 that DALI feeds with them, which needs pydantic and DALI. The results in OUT_DIR are summary.txt and
# gpu.tar.gz, with all figures as JSON lines and all logs; it is packed again after each stage. --cache takes the output of
# bench/compile_cache.sh, or triton-cache.tar.gz of an earlier run. That of this run has the kernels that no --cache had,
# unless they are more than 40 MiB. --dry runs the stages on a CPU, with interpreted kernels and small shapes. The exit code
# is that of the worst stage.
set -u
usage() { echo "usage: bench/gpu.sh [--stage NAME]... [--cache FILE]... [--dry] OUT_DIR" >&2; exit 2; }
TIMED=(stages launches variants norm ncu compare step data) UNTIMED=(tests sanitizers train)
WANTED=() CACHES=() DRY=0 TARGET=""
while [ $# -gt 0 ]; do
  case $1 in
    --stage) [ $# -gt 1 ] || usage; WANTED+=("$2"); shift 2 ;;
    --cache) [ $# -gt 1 ] || usage; CACHES+=("$2"); shift 2 ;;
    --dry) DRY=1; shift ;;
    -*) usage ;;
    *) [ -z "$TARGET" ] || usage; TARGET=$1; shift ;;
  esac
done
[ -n "$TARGET" ] || usage
for stage in ${WANTED[@]+"${WANTED[@]}"}; do
  case " ${TIMED[*]} ${UNTIMED[*]} " in
    *" $stage "*) ;;
    *) echo "error: stage: found $stage, expected one of ${TIMED[*]} ${UNTIMED[*]}" >&2; exit 2 ;;
  esac
done
[ ${#WANTED[@]} -gt 0 ] || WANTED=(stages launches variants norm ncu compare "${UNTIMED[@]}")
for number in ${CACHES[@]+"${!CACHES[@]}"}; do
  file=${CACHES[number]}
  [ -f "$file" ] || { echo "error: cache: found no file $file, expected the output of bench/compile_cache.sh" >&2; exit 2; }
  CACHES[number]=$(cd "$(dirname "$file")" && pwd)/$(basename "$file")
done
mkdir -p "$TARGET" || exit 2
OUT=$(cd "$TARGET" && pwd)
cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$ROOT/.venv/bin/python" || command -v python3)}
[ -n "$PYTHON" ] || { echo "error: found no Python, expected one with PyTorch: PYTHON=..." >&2; exit 2; }
WORK=$(mktemp -d)
CLOCKS="" JOBS=()
finish() { [ -z "$CLOCKS" ] || kill "$CLOCKS" 2>/dev/null; rm -rf "$WORK"; }
trap finish EXIT
mkdir "$WORK/gpu"

# The package as a tree of links. The checkout itself must not be on Python's path: its synco_fast lacks the other folders.
"$PYTHON" tests/support/layout.py "$WORK/links" || exit 2
export PYTHONSAFEPATH=1 PYTHONPATH="$WORK/links${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="$WORK/triton"
mkdir "$TRITON_CACHE_DIR"
for file in ${CACHES[@]+"${CACHES[@]}"}; do
  tar -xzf "$file" -C "$TRITON_CACHE_DIR" || echo "warning: cache: $file cannot be unpacked, kernels compile anew" >&2
done
ls -A "$TRITON_CACHE_DIR" > "$WORK/carried"
[ "$DRY" = 0 ] || export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""

if ! "$PYTHON" - "$DRY" <<'PY'
import importlib
import sys

needed = ["torch", "triton", "rich", "numpy", "pytest"]
needed += [f"synco_fast.{name}" for name in ("cli", "bench.loss", "bench.launches", "bench.stages", "bench.variants")]
needed += [f"synco_fast.{name}" for name in ("bench.summary", "kernels.validation", "kernels.triton")]
for name in needed:
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"error: found no working {name} ({type(error).__name__}: {error}), expected it in {sys.executable}")
import torch

if sys.argv[1] == "0" and not torch.cuda.is_available():
    sys.exit("error: found no CUDA device, expected one that PyTorch sees, or --dry")
PY
then exit 2; fi

SYNCO=("$PYTHON" -m synco_fast)
# All stages together end before this many seconds, even if each reaches its limit.
SLOWER=$((DRY ? 10 : 1))
DEADLINE=$((SECONDS + 535 * SLOWER))
# What runs beside each other comes last; RESERVED seconds are its own, the longest of its limits and a few to end in.
RESERVED=0 beside=()
for stage in "${WANTED[@]}"; do
  case " ${UNTIMED[*]} " in *" $stage "*) beside+=("$stage") RESERVED=$((160 * SLOWER)) ;; esac
done
mkdir "$WORK/codes"
: > "$WORK/gpu/parts.txt"

pack() { # Pack the results so far, atomically. A stage beside this one may still be writing, which is no error.
  tar -czf "$OUT/.gpu.$BASHPID" -C "$WORK" gpu 2> /dev/null
  mv "$OUT/.gpu.$BASHPID" "$OUT/gpu.tar.gz"
}

has() { "$PYTHON" -c "import $1" 2> /dev/null; }

note() { printf '%-24s %-9s %4s s\n' "$1" "$2" "$3" | tee -a "$WORK/gpu/parts.txt"; }

part() { # part NAME SECONDS COMMAND...: JSON lines on standard output go to NAME.jsonl, everything else to NAME.log
  local name=$1 limit=$2 start=$SECONDS code left
  shift 2
  limit=$((limit * SLOWER))
  left=$((DEADLINE - SECONDS - RESERVED - 3))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 2 ]; then
    note "$name" "no time" 0
    return
  fi
  printf '%s\n' "$*" > "$WORK/gpu/$name.log"
  timeout --kill-after=3 "$limit" "$@" > "$WORK/said-$name" 2>> "$WORK/gpu/$name.log"
  code=$?
  cat "$WORK/said-$name" >> "$WORK/gpu/$name.log"
  grep '^{' "$WORK/said-$name" > "$WORK/gpu/$name.jsonl" || rm -f "$WORK/gpu/$name.jsonl"
  : > "$WORK/codes/$code"
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then note "$name" "time out" $((SECONDS - start)); else
    note "$name" "exit $code" $((SECONDS - start))
  fi
  pack
}

if [ "$DRY" = 1 ]; then
  # Small shapes, since the interpreter takes seconds for what a GPU does in microseconds.
  SHAPE=(--rows 1 --length 300 --dim 64 --hard 20 --synthetic 60) ONCE=("${SHAPE[@]}") DTYPES=(float32) REPEATS=1
  export OMP_NUM_THREADS=1
else
  SHAPE=(--rows 256 --length 65536 --dim 128 --hard 1024) DTYPES=(bfloat16 float32 float16) REPEATS=30
  # Odd sizes: the last mask word, the last tile and the last row block are partial.
  ONCE=(--rows 65 --length 4097 --dim 64 --hard 63)
fi

do_stages() {
  local dtype
  for dtype in "${DTYPES[@]}"; do
    part "stages-$dtype" 60 "$PYTHON" -m synco_fast.bench.stages --dtype "$dtype" "${SHAPE[@]}"
  done
}

do_launches() {
  local dtype
  for dtype in "${DTYPES[@]}"; do
    [ "$dtype" = float16 ] || part "launches-$dtype" 40 "$PYTHON" -m synco_fast.bench.launches --dtypes "$dtype" \
      --repeats "$REPEATS" "${SHAPE[@]}"
  done
}

do_variants() {
  local most=()
  [ "$DRY" = 0 ] || most=(--most 2)
  part variants 110 "$PYTHON" -m synco_fast.bench.variants --repeats "$REPEATS" "${most[@]}" "${SHAPE[@]}"
}

do_norm() {
  # Without the compiled formula: compiling it for each layer would take longer than everything else.
  local size=(--repeats 10 --rounds 2 --subjects grouped plain native triton) cases=() plain=()
  if [ "$DRY" = 1 ]; then
    size=(--device cpu --backbone resnet18 --size 64 --batch 8 --repeats 1 --rounds 1 --dtype float32 --groups 2 --subjects split plain)
    # Interpreted cases take minutes, so a dry run compares the backends that run on a CPU.
    cases=(--dtypes float32) plain=(env --unset TRITON_INTERPRET)
  fi
  part norm 60 "${SYNCO[@]}" bench norm "${size[@]}" --json "$WORK/gpu/norm.json"
  part norm-validate 90 "${plain[@]}" "${SYNCO[@]}" validate --part norm "${cases[@]}" --json "$WORK/gpu/norm-validate.json"
}

do_ncu() {
  local ncu names
  ncu=$(command -v ncu || ls /usr/local/cuda*/bin/ncu 2>/dev/null | tail -1)
  [ -n "$ncu" ] && [ "$DRY" = 0 ] || { note ncu "not there" 0; return; }
  names=$("$PYTHON" -c 'from synco_fast.bench.stages import CHECKS; print("|".join(CHECKS))')
  # Do not lock the clocks. Profile only the first series of launches, which is cached already.
  part ncu 50 "$ncu" --clock-control none --kernel-name-base function -k "regex:^($names)\$" -c 12 --csv --page details \
    --section SpeedOfLight --section WarpStateStats --section Occupancy --section LaunchStats \
    --section MemoryWorkloadAnalysis "$PYTHON" -m synco_fast.bench.launches --once "${SHAPE[@]}"
}

do_tests() {
  # -v: a line for each test as it ends, since the XML is missing where the time limit cuts the tests off.
  local options=(-m gpu -v -p no:cacheprovider --junitxml "$WORK/gpu/tests.xml") files=(tests/kernels)
  if has pydantic; then
    files+=(tests/data/test_gpu.py tests/training/test_gpu.py tests/bench/test_timing.py)
  else
    options+=(--confcutdir tests/kernels)
  fi
  has pytest_timeout && options+=(--timeout 100)
  if has xdist; then options+=(--numprocesses "$([ "$DRY" = 1 ] && echo 0 || echo 8)"); fi
  part tests 150 "$PYTHON" -m pytest "${options[@]}" "${files[@]}"
}

do_sanitizers() {
  local sanitizer tool
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
  # Without PyTorch's caching allocator every tensor is an allocation whose bounds and first write the tools can see.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  if [ "$DRY" = 1 ]; then
    part sanitizers 60 "$PYTHON" -m synco_fast.bench.launches --once --dtypes float32 "${ONCE[@]}"
  elif [ -n "$sanitizer" ]; then
    for tool in memcheck initcheck racecheck; do
      part "$tool" 150 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$PYTHON" -m synco_fast.bench.launches --once --dtypes bfloat16 float32 "${ONCE[@]}" &
    done
    wait
  else
    note sanitizers "not there" 0
  fi
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

do_train() {
  local limit=() device=auto
  has pydantic || { note train "not there" 0; return; }
  if [ "$DRY" = 1 ]; then limit=(--max-steps 2) device=cpu; fi
  # The interpreter is for the kernels, which a run on a CPU does not use.
  part train 150 env --unset TRITON_INTERPRET XDG_CACHE_HOME="$WORK/cache" "${SYNCO[@]}" pretrain --config demo --data demo \
    --training.device $device --out "$WORK/run" "${limit[@]}"
  [ ! -f "$WORK/run/metrics.jsonl" ] || cp "$WORK/run/metrics.jsonl" "$WORK/gpu/train-metrics.txt"
}

do_compare() {
  local backends=(triton blockwise topk linear-ce reference released compiled) choices=(triton topk topk-only) device=cuda
  if [ "$DRY" = 1 ]; then backends=(blockwise topk) choices=(topk) device=cpu; fi
  has flashinfer && choices+=(topk-flashinfer topk-flashinfer-only)
  has liger_kernel && backends+=(linear-ce-liger)
  part selection 45 "${SYNCO[@]}" bench loss --part selection --backends "${choices[@]}" --device $device "${SHAPE[@]}" \
    --repeats "$REPEATS" --rounds 1 --lines "$WORK/gpu/selection.jsonl.part"
  part compare 120 "${SYNCO[@]}" bench loss --backends "${backends[@]}" --device $device "${SHAPE[@]}" \
    --repeats $((REPEATS < 5 ? REPEATS : 5)) --rounds 1 --lines "$WORK/gpu/compare.jsonl.part"
  local name
  for name in selection compare; do
    [ ! -f "$WORK/gpu/$name.jsonl.part" ] || mv "$WORK/gpu/$name.jsonl.part" "$WORK/gpu/$name.jsonl"
  done
}

do_step() {
  part step 120 "${SYNCO[@]}" bench step --config synco-r50-200 --subjects encoder-plain encoder synco moco \
    --engines graph eager --backends triton --steps 10 --rounds 1 --json "$WORK/gpu/step.json"
}

do_data() {
  local photos="$WORK/photos" views=(--photos 512 --batch 256 --seconds 4 --rounds 2) size=(--max-steps 400) copies=256
  local pipelines=(torchvision dali dali-fused)
  has pydantic && has nvidia.dali || { note data "not there" 0; return; }
  if [ "$DRY" = 1 ]; then
    pipelines=(torchvision dali)
    views=(--photos 16 --batch 8 --seconds 1 --rounds 1 --workers 1 --device cpu) copies=2
    size=(--max-steps 2 --training.device cpu --training.batch 16 --augment.size 64 --method.queue 32)
    size+=(--method.hard 8 --data.workers 1)
  fi
  part data 150 env --unset TRITON_INTERPRET "${SYNCO[@]}" bench data --pipelines "${pipelines[@]}" \
    --folder "$photos" "${views[@]}" --json "$WORK/gpu/data.json"
  # Each photo under many names, since the queue needs more images than are drawn.
  "$PYTHON" - "$photos" "$WORK/many" "$copies" <<'PY'
import os
import sys

photos, many, copies = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(copies):
    os.makedirs(f"{many}/{number:03d}")
    for name in os.listdir(photos):
        os.link(f"{photos}/{name}", f"{many}/{number:03d}/{name}")
PY
  part data-train 160 env --unset TRITON_INTERPRET XDG_CACHE_HOME="$WORK/cache" "${SYNCO[@]}" pretrain \
    --config synco-r50-200 --data "$WORK/many" --data.pipeline dali --method.warmup_epochs 0 --evaluation.every 0 \
    --out "$WORK/data-run" "${size[@]}"
  [ ! -f "$WORK/data-run/metrics.jsonl" ] || cp "$WORK/data-run/metrics.jsonl" "$WORK/gpu/data-metrics.txt"
}

"$PYTHON" - > "$WORK/gpu/environment.json" <<'PY'
import json

from synco_fast.runtime.environment import describe_environment

print(json.dumps(describe_environment(), indent=1))
PY
if command -v nvidia-smi > /dev/null && [ "$DRY" = 0 ]; then
  nvidia-smi -q > "$WORK/gpu/nvidia-smi.txt" 2>&1
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv -l 1 \
    > "$WORK/gpu/clocks.csv" 2>&1 &
  CLOCKS=$!
fi
for stage in "${WANTED[@]}"; do
  case " ${UNTIMED[*]} " in *" $stage "*) ;; *) "do_$stage" ;; esac
done
RESERVED=0
for stage in ${beside[@]+"${beside[@]}"}; do
  # A dry run has a core or two.
  if [ "$DRY" = 1 ]; then "do_$stage"; else "do_$stage" & JOBS+=($!); fi
done
[ ${#JOBS[@]} = 0 ] || wait "${JOBS[@]}"

# Return the compiled kernels, so that the next run need not compile them; those of --cache are there already.
FRESH="$WORK/gpu/triton-cache.tar.gz"
(cd "$TRITON_CACHE_DIR" && tr '\n' '\0' < "$WORK/carried" | xargs -0 -r rm -rf --)
if bench/compile_cache.sh --prune "$TRITON_CACHE_DIR" "$FRESH" > /dev/null 2>&1; then
  SIZE=$(wc -c < "$FRESH")
  if [ "$SIZE" -gt $((40 << 20)) ]; then
    rm "$FRESH"
    echo "triton-cache             not packed: $((SIZE >> 20)) MiB, expected at most 40" | tee -a "$WORK/gpu/parts.txt"
  fi
else
  rm -f "$FRESH"
  echo "triton-cache             not packed: tar failed" | tee -a "$WORK/gpu/parts.txt"
fi
"$PYTHON" -m synco_fast.bench.summary "$WORK/gpu" > "$WORK/gpu/summary.txt" 2>&1 || : > "$WORK/codes/1"
pack
cp "$WORK/gpu/summary.txt" "$OUT/summary.txt"
cat "$OUT/summary.txt"
WORST=$(ls "$WORK/codes" | sort -n | tail -1)
exit "${WORST:-0}"
