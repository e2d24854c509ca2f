"""Hooks of MkDocs: what is written once elsewhere comes into pages, and links lead where they do on GitHub.

- A line `<!-- README: lead -->` becomes the text of README.md before its first section, and
  `<!-- README: first code of SECTION -->` the first block of code in a section.
- A line `<!-- longshort --help -->` becomes the help of every command.
- CHANGELOG.md and CONTRIBUTING.md are pages. Links to other files that are not part of the site lead to the
  repository.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

from longshort.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files at the root of the repository, and the pages of the site that show them."""

_INCLUDE = re.compile(r"^<!-- (README: .*|longshort --help) -->$", re.MULTILINE)
_TARGET = re.compile(r'(?<=\]\()(?![a-z]+:|#)([^)#\s]+)|(?<=src=")(?![a-z]+:)([^"]+)')
_FURTHER_NAMES = re.compile(
    r"(<b><code>(?:<span[^>]*>)?\w+,)((?:</span>)?</code></b>)\s*\(<code>(.*?)</code>\)"
)
"""The names after the first in an entry such as `q, k, v: tensors`; griffe takes them for its type."""
_MARKUP = re.compile(r"<[^>]*>|[()]")
_COMMAND = re.compile(r"^  ([a-z]+)  ", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Set the address of the repository, as pyproject.toml has it."""
    config.repo_url = repository()
    config.repo_name = "Source"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose files are at the root of the repository."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]  # of the extra `docs`

    for name, page in PAGES.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_context: Any) -> str:
    """Include what is written elsewhere, and let links lead to pages or to the repository."""
    source = Path(page.file.abs_src_path)
    if page.file.src_uri.startswith("reference/") or page.file.src_uri == "changelog.md":
        page.meta["search"] = {"boost": 0.05}  # pages that explain come first
    here = _links_for(markdown, source.parent, page.file.src_uri, files.src_uris)
    return _INCLUDE.sub(
        lambda line: _links_for(included(line[1]), ROOT, page.file.src_uri, files.src_uris), here
    )


def on_page_content(html: str, **_context: Any) -> str:
    """Let wide tables scroll, by the keyboard too, and show all names of an entry for several attributes."""
    html = _FURTHER_NAMES.sub(lambda entry: f"{entry[1]} {_MARKUP.sub('', entry[3])}{entry[2]}", html)
    html = html.replace("<table>", '<div class="wide" tabindex="0"><table>')
    return html.replace("</table>", "</table></div>")


def repository() -> str:
    """Read the address of the repository from pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def public_modules() -> list[str]:
    """Read the public modules from docs/policy.md.

    Raises:
        ValueError: the page does not name them where it did.
    """
    text = (ROOT / "docs" / "policy.md").read_text().partition("- **Python names**")[2]
    modules = sorted(re.findall(r"`(longshort[\w.]*)`", text.partition(", with their")[0]))
    if not modules:
        raise ValueError("docs/policy.md does not name the public modules after '- **Python names**'")
    return modules


def included(what: str) -> str:
    """Return the text that a line of a page asks for.

    Raises:
        ValueError: README.md has no such section, or no code in it.
    """
    if what == "longshort --help":
        return command_help()
    readme = (ROOT / "README.md").read_text()
    lead, *sections = re.split(r"^## ", readme, flags=re.MULTILINE)
    if what == "README: lead":
        return lead.partition("\n")[2].strip()  # without the title
    name = what.removeprefix("README: first code of ")
    for section in sections:
        title, _, text = section.partition("\n")
        code = re.search(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
        if title == name and code:
            return code[0]
    raise ValueError(f"README.md has no section {name!r} with code")


def command_help() -> str:
    """Return the help of all commands, in Markdown."""
    overview = _help_of()
    commands = [(command,) for command in _COMMAND.findall(overview)]
    commands += [("bench", name) for name in _COMMAND.findall(_help_of("bench"))]
    commands += [("train", "--resume", "RUN")]
    parts = [f"## longshort {' '.join(it)}\n\n{_as_block(_help_of(*it))}" for it in sorted(commands)]
    return "\n\n".join([_as_block(overview), *parts])


def _help_of(*command: str) -> str:
    with (
        mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"),
        contextlib.redirect_stdout(io.StringIO()) as stdout,
    ):
        code = main([*command, "--help"])
    if code != 0:
        raise RuntimeError(f"longshort {' '.join(command)} --help ended with code {code}")
    return stdout.getvalue()


def _as_block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


def _links_for(markdown: str, folder: Path, page: str, pages: Any) -> str:
    """Rewrite links of a text that lies in `folder`, for a page of the site."""

    def rewrite(match: re.Match[str]) -> str:
        link = match[0]
        target = (folder / link).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link  # not a link; or a dead one, which MkDocs reports
        path = target.relative_to(ROOT).as_posix()
        uri = PAGES.get(path, path.removeprefix("docs/"))
        if uri in pages:
            return os.path.relpath(uri, Path(page).parent.as_posix())
        return f"{repository()}/{'tree' if target.is_dir() else 'blob'}/main/{path}"

    return _TARGET.sub(rewrite, markdown)
