#!/usr/bin/env bash
# Runs tests with the oldest or the newest versions that pyproject.toml allows of longshort[train] and what it needs, in
# the environment build/test-oldest or build/test-newest. TOOLS is one with requirements/release.txt.
# PyPI's torch comes with the libraries of CUDA; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids them.
set -euo pipefail
if [ $# -lt 2 ] || { [ "$2" != oldest ] && [ "$2" != newest ]; }; then
  echo "usage: $0 TOOLS oldest|newest [TEST...]" >&2
  exit 2
fi
tools=$(realpath "$1")
which=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests=("$@")
if [ $# -eq 0 ]; then
  tests=(tests/test_*.py tests/backends tests/cache tests/huggingface tests/model tests/training)
fi
resolution=highest
[ "$which" = newest ] || resolution=lowest-direct
folder=build/test-$which
"$tools/bin/uv" pip compile --quiet --python-version 3.11 --resolution "$resolution" --extra train --no-header \
  --no-annotate --no-emit-package longshort pyproject.toml --output-file "build/$which.txt"
test -x "$folder/bin/python" || python3.11 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -r "build/$which.txt"
# the tools of the tests, in whatever version fits
"$folder/bin/python" -m pip install --quiet -c "build/$which.txt" \
  accelerate hypothesis jaxtyping psutil pytest pytest-timeout pytest-xdist
"$folder/bin/python" -m pip install --quiet --no-deps .
# other versions of packages warn of other things
"$folder/bin/python" -m pytest -q -n auto -o filterwarnings=default -m "not slow" "${tests[@]}"
