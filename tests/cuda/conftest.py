"""Leaves out what a machine with a GPU, and with little more than torch and pytest, cannot import."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = {
    "test_decoding.py": ("transformers",),
    "test_training.py": (
        "annotated_types", "jinja2", "numpy", "pandas", "rich", "safetensors", "tokenizers", "transformers",
    ),
}  # fmt: skip

_missing = {
    file: [package for package in packages if find_spec(package) is None]
    for file, packages in _NEEDED.items()
}
collect_ignore = [file for file, packages in _missing.items() if packages]


def pytest_report_header() -> list[str]:
    """Name what is left out."""
    return [
        f"left out: tests/cuda/{file}, which needs {', '.join(packages)}"
        for file, packages in _missing.items()
        if packages
    ]
