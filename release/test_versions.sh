#!/usr/bin/env bash
# Runs tests with the oldest or the newest versions that pyproject.toml allows of longshort[all] and what it needs, in
# the environment build/test-oldest or build/test-newest of PYTHON, python3 by default: for the oldest it must be 3.11,
# for which the oldest packages have wheels. TOOLS is an environment with requirements/release.txt.
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
  tests=(tests/test_*.py tests/backends tests/cache tests/conversion tests/distributed tests/evaluation tests/huggingface
    tests/model tests/training)
fi
resolution=highest
[ "$which" = newest ] || resolution=lowest-direct
folder=build/test-$which
version='import sys; print(sys.version_info[:2])'
if [ "$("$folder/bin/python" -c "$version" 2>/dev/null)" != "$("${PYTHON:-python3}" -c "$version")" ]; then
  "${PYTHON:-python3}" -m venv --clear "$folder"
fi
"$tools/bin/uv" pip compile --quiet --python "$folder/bin/python" --resolution "$resolution" --extra all --no-header \
  --no-annotate --no-emit-package longshort pyproject.toml --output-file "build/$which.txt"
# uv reads no settings of pip, which chooses the build of torch; so the list only constrains pip, and packages of CUDA in
# it are installed only with a torch that needs them. The tools of the tests come in whatever version fits.
"$folder/bin/python" -m pip install --quiet -c "build/$which.txt" '.[all]' \
  accelerate hypothesis jaxtyping nbclient nbformat pexpect psutil pytest pytest-timeout pytest-xdist
# Other versions of packages warn of other things, also in tests that run pytest.
export PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} -o filterwarnings=default"
# torch's compiler of another version finds its cache empty, which takes time
"$folder/bin/python" -m pytest -q -n auto --timeout 1800 -m "not slow" "${tests[@]}"
