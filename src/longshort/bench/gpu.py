"""The check before `make gpu`: a GPU that torch can use, and the packages that its parts need.

`python -m longshort.bench.gpu PART…` ends with a message and exit code 1 if anything is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

_ATTENTION = ("annotated-types", "matplotlib", "numpy", "pandas", "rich", "tyro")
_MODELS = (*_ATTENTION, "transformers")
PACKAGES = {
    "test": ("pytest",),
    "attention": _ATTENTION,
    "models": _MODELS,
    "study": (*_MODELS, "jinja2", "scipy"),
}
"""The packages that each part of `make gpu` needs beside torch and Triton."""


def missing(parts: Sequence[str]) -> str | None:
    """Return what these parts of `make gpu` lack here, in a sentence, or None."""
    needed = dict.fromkeys(package for part in parts for package in PACKAGES[part])
    absent = [package for package in needed if find_spec(package.replace("-", "_")) is None]
    if absent:
        return f"this needs {', '.join(absent)}: {sys.executable} -m pip install {' '.join(absent)}"
    if not torch.cuda.is_available():
        return f"this needs a GPU, and torch {torch.__version__} finds none"
    if find_spec("triton") is None:
        return f"this needs Triton, which comes with torch for GPUs; torch {torch.__version__} came without"
    return None


if __name__ == "__main__":
    sys.exit(missing(sys.argv[1:]))
