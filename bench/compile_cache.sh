#!/usr/bin/env bash
# Compile the loss kernels for another machine's GPU, and pack the Triton cache.
#
#   bench/compile_cache.sh [--capability 90] [--tests] OUT.tar.gz     with the Python of .venv or PYTHON=...
#   bench/compile_cache.sh --prune CACHE_DIR OUT.tar.gz               pack an existing cache
#
# Both machines must have exactly the same version of Triton. --tests adds the shapes of the GPU tests, which takes many
# minutes. bench/gpu.sh --cache OUT.tar.gz uses the result.
set -eu
usage() { echo "usage: bench/compile_cache.sh [--capability 90] [--tests] OUT.tar.gz" >&2; exit 2; }
CAPABILITY=90 TESTS="" PRUNE="" TARGET=""
while [ $# -gt 0 ]; do
  case $1 in
    --capability) [ $# -gt 1 ] || usage; CAPABILITY=$2; shift 2 ;;
    --tests) TESTS=--tests; shift ;;
    --prune) [ $# -gt 1 ] || usage; PRUNE=$2; shift 2 ;;
    -*) usage ;;
    *) [ -z "$TARGET" ] || usage; TARGET=$1; shift ;;
  esac
done
[ -n "$TARGET" ] || usage

pack() { # Keep the machine code and its metadata; drop the intermediate representations.
  find "$1" -type f \( -name '*.ttir' -o -name '*.ttgir' -o -name '*.llir' -o -name '*.ptx' -o -name '*.source' -o -name '*.so' \) -delete
  tar -czf "$2" -C "$1" .
}

if [ -n "$PRUNE" ]; then
  COPY=$(mktemp -d)
  trap 'rm -rf "$COPY"' EXIT
  cp -r "$PRUNE/." "$COPY/"
  pack "$COPY" "$TARGET"
  exit
fi
TARGET=$(cd "$(dirname "$TARGET")" && pwd)/$(basename "$TARGET")
cd "$(dirname "$0")/.."
ROOT=$PWD
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$ROOT/.venv/bin/python" || command -v python3)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/cache"
"$PYTHON" tests/support/layout.py "$WORK/links"
export PYTHONSAFEPATH=1 PYTHONPATH="$WORK/links" TRITON_CACHE_DIR="$WORK/cache"
unset TRITON_INTERPRET
"$PYTHON" -m synco_fast.bench.compile_cache --capability "$CAPABILITY" $TESTS
pack "$WORK/cache" "$TARGET"
echo "$TARGET: $(($(wc -c < "$TARGET") >> 10)) KiB"
