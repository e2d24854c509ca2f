"""The blocks of the documentation run as they stand, those of long pages in a small size."""

import re
from pathlib import Path

import pytest
from docs.render import run_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
SMALLER = {
    "how-to-spikes.md": {
        "STEPS, RESTART = 200, 100": "STEPS, RESTART = 4, 2",
        "LENGTH, BATCH = 128, 16": "LENGTH, BATCH = 32, 2",
        'prepare("stdlib", "data")': 'prepare(str(Path(inspect.__file__).parent / "json"), "data")',
        "inspect.getsource(textwrap)": "inspect.getsource(textwrap)[:500]",
    }
}
"""What stands in a page whose blocks take minutes, and what takes its place here."""
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for written, used in SMALLER.get(page.name, {}).items():
        assert written in text
        text = text.replace(written, used)
    run_page(text, str(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []
