"""Runs a page of this documentation or a notebook from top to bottom, and puts its output into it.

    python docs/render.py docs/how-to-spikes.md
    python docs/render.py examples/ls_attention.ipynb
    python docs/render.py --in . docs/how-to-shrink.md

A block of Python that prints something is followed by a block of text with its output, which is replaced.
In a block of the console, each line with a prompt is run, and what follows it is replaced. The code runs in a
new temporary folder, or in the one that --in names; pictures that it writes there and the page shows, under
the same name, are copied.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from longshort.cli import main
from longshort.reporting.files import replace_file

_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"\]\((images/[^)]+)\)")


def run_page(text: str, name: str, given: Mapping[str, Any] | None = None) -> str:
    """Run the blocks of a page in the working directory; return the page with their output.

    Args:
        text: the page, in Markdown.
        name: what tracebacks call it.
        given: values of names that its code uses and does not define.

    Raises:
        RuntimeError: a command failed.
    """
    names: dict[str, Any] = {"__name__": "docs", **(given or {})}
    parts, end = [], 0
    for block in _BLOCK.finditer(text):
        parts.append(text[end : block.start()])
        if block[1] == "console":
            commands = [line for line in block[2].splitlines() if line.startswith("$ ")]
            printed = "".join(f"{command}\n{_run_command(command[2:])}" for command in commands)
            parts.append(f"```console\n{printed}```\n")
        else:
            # as many empty lines as come before the block, so that a traceback shows the page's line
            code = "\n" * (text.count("\n", 0, block.start()) + 1) + block[2]
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(code, name, "exec"), names)
            printed = stdout.getvalue()
            output = f"\n```text\n{printed}```\n" if printed else ""
            parts.append(f"```python\n{block[2]}```\n{output}")
        end = block.end()
    return "".join([*parts, text[end:]])


def _run_command(command: str) -> str:
    program, *arguments = shlex.split(command)
    if program != "longshort":
        raise RuntimeError(f"a command of a page must be one of longshort, got {command!r}")
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = main(arguments)
    if code != 0:
        raise RuntimeError(f"{command!r} ended with code {code}")
    return "".join(line.rstrip() + "\n" for line in stdout.getvalue().splitlines())


def run_notebook(notebook: Any, folder: Path) -> None:
    """Execute a notebook in a new kernel that starts in `folder`, and store the outputs in it, without times.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell.metadata.clear()


def render(page: Path, folder: Path) -> None:
    """Run a page in a folder, and replace it by itself with its output and its pictures."""
    if page.suffix == ".ipynb":
        notebook = nbformat.read(page, as_version=4)
        run_notebook(notebook, folder)
        replace_file(page, (nbformat.writes(notebook) + "\n").encode())
        return
    text = page.read_text()
    with contextlib.chdir(folder):
        text = run_page(text, str(page))
        for link in _PICTURE.findall(text):
            if Path(link).exists():
                (page.parent / link).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(link, page.parent / link)
    replace_file(page, text.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run pages, and put what they print into them.")
    parser.add_argument("--in", dest="folder", type=Path, help="where to run; the default is a new folder")
    parser.add_argument("pages", nargs="+", type=Path)
    arguments = parser.parse_args()
    for page in arguments.pages:
        with tempfile.TemporaryDirectory() as new:
            render(page.resolve(), arguments.folder or Path(new))
