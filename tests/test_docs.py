"""The blocks of the documentation run as they stand, those of long pages in a small size; commands that would
take long, or need more than this machine has, are parsed. The site has every page, and every public name."""

import ast
import contextlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tyro
from docs.render import run_page
from docs.site_hooks import PAGES as PAGES_OF_ROOT
from docs.site_hooks import included, on_page_content, public_modules, repository
from tests.conversion.models import random_llama
from tests.test_public_api import MODULES
from torch.distributed.run import get_args_parser

from longshort.cli import main
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
    },
    "quickstart.md": {
        "longshort data stdlib": f"longshort data {Path(json.__file__).parent}",
        "--vocab-size 10000": "--vocab-size 300",
        "--steps 600": "--steps 2",
        "step-600": "step-2",
    },
}
"""Replacements in pages whose blocks would take minutes."""
RUN_COMMANDS = {"quickstart.md"}
"""Pages whose commands in blocks of `sh` are run too."""
EXACT = {"scaling.md", "inference.md"}
"""Pages whose output is the same everywhere."""
DOCTOR = (["doctor"], ["doctor", "--json"])
OTHER_PROGRAMS = {"python3", "pip", "python", "tensorboard", "echo"}
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


class Block(NamedTuple):
    page: str
    kind: str
    text: str
    follows: str | None
    """The kind of the block before, if nothing is between the two."""


def blocks(page: Path) -> Iterator[Block]:
    text, end, kind = page.read_text(), -1, None
    for match in BLOCK.finditer(text):
        touches = kind is not None and not text[end : match.start()].strip()
        yield Block(page.name, match[1], match[2], kind if touches else None)
        end, kind = match.end(), match[1]


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def as_console(block: re.Match[str]) -> str:
    """Return a block of commands as one of the console; `echo TEXT > FILE` becomes Python."""
    if block[1] != "sh":
        return block[0]
    parts = []
    for words in commands(block[2]):
        if words[0] == "echo":
            parts.append(f"```python\n__import__('pathlib').Path({words[3]!r}).write_text({words[1]!r})\n```")
        else:
            parts.append(f"```console\n$ {shlex.join(words)}\n```")
    return "\n\n".join(parts)


def small_model() -> dict[str, Any]:
    return {"model": random_llama(num_attention_heads=8), "input_ids": torch.randint(3, 96, (1, 20))}


NAMES = {"README.md": small_model}
"""What the blocks of a page take for granted."""


@pytest.mark.parametrize("page", [page for page in PAGES if page != SHRINK], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for written, used in SMALLER.get(page.name, {}).items():
        assert written in text
        text = text.replace(written, used)
    if page.name in RUN_COMMANDS:
        text = BLOCK.sub(as_console, text)
    result = run_page(text, str(page), NAMES.get(page.name, dict)())
    assert page.name not in EXACT or result == text, f"python docs/render.py {page} renews it"


@pytest.mark.slow
def test_the_cache_of_a_small_model_is_shrunk_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page as it stands, but for the budget of time, on a small model in place of the example."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".cache" / "smollm2"
    model = random_llama(
        hidden_size=36, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
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
def test_blocks_of_each_kind_are_run_or_checked(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.setattr(tyro, "cli", parse_only(tyro.cli))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # commands for a GPU ask
    for block in blocks(page):
        match block.kind:
            case "python" | "console":
                pass  # run by the tests above
            case "sh":
                for words in commands(block.text):
                    check_command(words, targets)
            case "py":
                assert block.text.startswith("# not run by the tests: ")
                ast.parse(block.text)
            case "json":
                json.loads(block.text)
            case "text":  # output, or a drawing
                assert block.follows == "python" or not re.search(
                    r"^(\$ |longshort |make |pip |torchrun |import |from \w+ import)",
                    block.text,
                    re.MULTILINE,
                ), block
            case _:
                pytest.fail(f"no test checks blocks of the kind {block.kind!r}: {block}")


class Parsed(BaseException):
    pass


def parse_only(parse: Any) -> Any:
    def cli(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    return cli


def check_command(words: list[str], targets: list[str]) -> None:
    """Check that a command exists and takes its arguments, without running it."""
    if "|" in words:
        words = words[words.index("|") + 1 :]
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "torchrun":
        launched = get_args_parser().parse_args(rest)
        assert launched.module and launched.training_script == "longshort"
        program, rest = "longshort", launched.training_script_args
    if program == "longshort":
        with contextlib.suppress(Parsed):
            # the doctor would look at GPUs, which are not there
            assert rest in DOCTOR if rest[:1] == ["doctor"] else main(rest) == 0, words
    elif program == "make":
        assert rest[0] in targets, words
    else:
        assert program in OTHER_PROGRAMS, words
        files = [word for flag, word in itertools.pairwise(rest) if flag == "-r"]
        assert all((ROOT / file).exists() for file in files), words


@pytest.mark.parametrize("page", [*PAGES, *DOCS.glob("reference/*.md")], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_an_entry_for_several_attributes_shows_all_names() -> None:
    entry = '<b><code><span title="m.A.q,">q,</span></code></b>\n  (<code>{}</code>)\n  –'
    names = '(<span title="m.A.k">k</span>, <span title="m.A.v">v</span>)'
    shown = on_page_content(entry.format(names))
    assert re.sub(r"<[^>]*>", "", shown) == "q, k, v\n  –"
    single = entry.replace("q,", "q").format("int")
    assert on_page_content(single) == single


def test_the_site_shows_each_page_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    shown = re.findall(r"\S+\.(?:md|html)$", nav, re.MULTILINE)
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(PAGES_OF_ROOT.values())
    assert sorted(page for page in shown if page.endswith(".md")) == sorted(there)
    assert all((DOCS / page).exists() for page in shown if page.endswith(".html"))


def test_the_landing_page_takes_its_numbers_from_the_readme() -> None:
    index = (DOCS / "index.md").read_text()
    lines = re.findall(r"^<!-- (README: .*) -->$", index, re.MULTILINE)
    lead, code = [included(line) for line in lines]
    assert lead in (ROOT / "README.md").read_text() and "docs/images/" in lead
    assert "HeadLayout.split" in code and code.startswith("```python")
    with pytest.raises(ValueError, match="no section 'Absent'"):
        included("README: first code of Absent")


def test_the_policy_names_the_public_modules() -> None:
    assert public_modules() == sorted(MODULES)


def test_links_to_the_repository_are_those_of_its_metadata() -> None:
    places = [*PAGES, ROOT / "mkdocs.yml", ROOT / "CITATION.cff", *DOCS.glob("*.py")]
    places += (ROOT / ".github").rglob("*.yml")
    found = [re.findall(r"https://github\.com/longshort/[\w.-]+", path.read_text()) for path in places]
    assert {link for links in found for link in links} == {repository()}
