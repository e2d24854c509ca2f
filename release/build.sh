#!/usr/bin/env bash
# Builds the last commit into the folder OUT: an sdist, and from it a wheel with the CPU kernels and one without.
# Two runs give the same bytes. TOOLS is a virtual environment with requirements/release.txt.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 TOOLS OUT" >&2
  exit 2
fi
if [ "$(uname)" != Linux ]; then
  echo "make wheels needs Linux, for auditwheel. Elsewhere \`pip wheel --no-deps .\` builds a wheel for this machine," \
    "and \`cibuildwheel\` (requirements/release.txt) builds those of a release." >&2
  exit 1
fi
tools=$(realpath "$1")
out=$(realpath --canonicalize-missing "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$tools/bin:$PATH"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

mkdir "$work/commit" "$work/sdist" "$work/source" "$work/dist"
git archive HEAD | tar -x -C "$work/commit"
python -m build --no-isolation --sdist --outdir "$work/dist" "$work/commit"
tar -xf "$work"/dist/*.tar.gz -C "$work/source" --strip-components 1
python -m build --no-isolation --wheel --outdir "$work/dist" -Cwheel.cmake=false -Cwheel.py-api=py3 "$work/source"
python -m build --no-isolation --wheel --outdir "$work/kernels" "$work/source"
# Where the kernels do not compile, this wheel is a pure one too, and auditwheel refuses it.
auditwheel repair --wheel-dir "$work/dist" "$work"/kernels/*.whl

mkdir -p "$out"
mv "$work"/dist/* "$out"
ls -l "$out"
