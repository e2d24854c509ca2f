"""The blocks of the documentation run as they stand, those of long pages in a small size."""

import re
from pathlib import Path

import pytest
from docs.render import run_page
from tests.conversion.models import random_llama

from longshort.data import byte_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
SHRINK = DOCS / "how-to-shrink.md"
SMALLER = {
    "how-to-spikes.md": {
        "STEPS, RESTART = 200, 100": "STEPS, RESTART = 4, 2",
        "LENGTH, BATCH = 128, 16": "LENGTH, BATCH = 32, 2",
        'prepare("stdlib", "data")': 'prepare(str(Path(inspect.__file__).parent / "json"), "data")',
        "inspect.getsource(textwrap)": "inspect.getsource(textwrap)[:500]",
    }
}
"""Replacements in pages whose blocks would take minutes."""
EXACT = {"scaling.md"}
"""Pages whose output is the same everywhere."""
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.mark.parametrize("page", [page for page in PAGES if page != SHRINK], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for written, used in SMALLER.get(page.name, {}).items():
        assert written in text
        text = text.replace(written, used)
    result = run_page(text, str(page))
    assert page.name not in EXACT or result == text, f"python docs/render.py {page} renews it"


@pytest.mark.slow
def test_the_cache_of_a_small_model_is_shrunk_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page as it stands, but for the budget of time, on a small model in place of the example."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".cache" / "smollm2"
    model = random_llama(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=8192,
    )  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = SHRINK.read_text()
    assert "--minutes 10" in text
    page = run_page(text.replace("--minutes 10", "--steps 2"), str(SHRINK))
    assert "\n8,192 tokens: " in page
    assert "\nthe same without a cache: True\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []
