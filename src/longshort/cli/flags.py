"""Parsing of a command's flags into a dataclass."""

from __future__ import annotations

import io
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import TypeVar

import tyro

from longshort.cli.errors import is_first_of_node

Flags = TypeVar("Flags")


def parse(kind: type[Flags], command: str, arguments: list[str], description: str | None = None) -> Flags:
    """Parse flags into an instance of `kind`, a dataclass whose fields' docstrings are their help.

    Raises:
        SystemExit: with 0 after --help; with 2, and a message on stderr, if a flag or its value is wrong, a
            ValueError of `kind` included. Of the processes of a node one prints them.
    """
    with ExitStack() as stack:
        if not is_first_of_node():
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        return tyro.cli(
            kind,
            prog=f"longshort {command}",
            description=description,
            args=arguments,
            config=(
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.DisallowNone,
                tyro.conf.PositionalMetavarFromFieldName,
            ),
        )
