"""These tests need Triton's interpreter, which a process decides for when it first imports Triton.

`tests/backends/test_triton.py` runs them in processes of their own.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let NumPy compute with infinities and NaN, in which the interpreter computes, as silently as a GPU."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
