"""The check before a release: every file and the tag name the same version."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longshort import __version__

ROOT = Path(__file__).parents[1]
NAMES = ("src/longshort/__init__.py", "CITATION.cff", "CHANGELOG.md")


def check(root: Path, version: str, ref: str) -> str:
    """Copy what the check reads and is not there yet, run it, and return its message, empty if it passes."""
    for name in (".ci/check-release", *NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            shutil.copy(ROOT / name, root / name)
    done = subprocess.run([root / ".ci/check-release", version, ref], capture_output=True, text=True)
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in which the present version is ready to be released."""
    text = (ROOT / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(f"{text}\n## [{__version__}] - 2025-01-01\n")
    return tmp_path


def test_a_version_that_all_name_passes(release: Path) -> None:
    assert check(release, __version__, f"refs/tags/v{__version__}") == ""


@pytest.mark.parametrize(
    ("version", "ref", "message"),
    [
        ("9.9.9", "refs/tags/v9.9.9", "__init__.py has __version__"),
        (__version__, "refs/heads/main", "run this from the tag"),
        (__version__, "refs/tags/v9.9.9", "run this from the tag"),
        ("1; echo", "refs/tags/v1; echo", "VERSION must be like"),
    ],
)
def test_another_version_or_tag_is_refused(release: Path, version: str, ref: str, message: str) -> None:
    assert message in check(release, version, ref)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_another_version_is_refused(release: Path, name: str) -> None:
    check(release, __version__, f"refs/tags/v{__version__}")
    path = release / name
    path.write_text(re.sub(re.escape(__version__), "9.9.9", path.read_text()))
    assert Path(name).name in check(release, __version__, f"refs/tags/v{__version__}")


def test_the_citation_names_the_present_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
