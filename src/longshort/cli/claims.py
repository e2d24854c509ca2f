"""The command `longshort claims`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longshort.cli.flags import parse
from longshort.studies.catalogue import STUDIES
from longshort.studies.framework.claims import claims_markdown, read_claims


@dataclass(frozen=True)
class ClaimsFlags:
    """Print the claims of finished studies as a table in Markdown: what the paper says, what was found here,
    and how far it was tested.

    Nothing is run or judged again. A claim that several folders hold is taken from the first in which it was
    measured.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `longshort study` wrote, such as those of several scales."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("FOLDERS must be one or more folders that `longshort study` wrote, got none")


def run(arguments: list[str]) -> int:
    flags = parse(ClaimsFlags, "claims", arguments)
    print(claims_markdown(read_claims(flags.folders, list(STUDIES))), end="")
    return 0
