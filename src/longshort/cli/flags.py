"""Parsing of a command's flags into a dataclass."""

from __future__ import annotations

from typing import TypeVar

import tyro

Flags = TypeVar("Flags")


def parse(kind: type[Flags], command: str, arguments: list[str], description: str | None = None) -> Flags:
    """Parse flags into an instance of `kind`, a dataclass whose fields' docstrings are their help.

    Raises:
        SystemExit: with 0 after --help; with 2, and a message on stderr, if a flag or its value is wrong, a
            ValueError of `kind` included.
    """
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
