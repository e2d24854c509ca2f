"""Installing where nothing can compile."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # pip fetches the build tools
def test_without_a_compiler_the_rest_is_installed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "src"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-", 2)[2] == "py3-none-any.whl"
    templates = {name for name in zipfile.ZipFile(wheel).namelist() if "/templates/" in name}
    assert templates == {
        "longshort/huggingface/templates/model_card.md",
        "longshort/reporting/templates/report.html",
    }
