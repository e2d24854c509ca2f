"""The command `longshort inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from longshort.cli.flags import parse
from longshort.cli.pretrained import SearchFlags, cut_windows, open_with_text, search_heads
from longshort.cli.units import format_bytes
from longshort.conversion.reports import LAYOUT_FILE, excess_text, proposal_table
from longshort.conversion.text import split_held_out
from longshort.reporting.console import console, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from longshort.conversion.inspection import Inspection


@dataclass(frozen=True, kw_only=True)
class InspectFlags(SearchFlags):
    """Find out which key/value heads of a pretrained decoder need distant tokens, and propose a layout.

    Heads are ranked on one part of the text, the layout is chosen on a second, and the rise of the loss is
    reported on a third. layout.json for `longshort convert`, figures and report.html are written to OUT. An
    interrupted inspection resumes when the command is called again.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a transformers model and its tokenizer, or its name on the Hugging Face Hub."""

    out: Path | None = None
    """Folder for the results. None: inspections/ and the model's name."""


def run(arguments: list[str]) -> int:
    flags = parse(InspectFlags, "inspect", arguments)
    out = flags.out or Path("inspections") / Path(flags.model).name
    with progress_bar() as show:
        pretrained, tokens = open_with_text(flags, flags.model, flags.text)
        parts = cut_windows(flags, pretrained, split_held_out(tokens)[0])
        found = search_heads(flags, flags.model, pretrained, parts, out, show)
    output = console()
    print_proposals(output, found, flags.cache_length)
    output.print(f"layout: {out / LAYOUT_FILE}\nreport: {out / 'report.html'}", markup=False)
    return 0


def print_proposals(output: Console, found: Inspection, length: int) -> None:
    """Print the table of layouts, and the size of the cache with the proposed one."""
    content = proposal_table(found)
    table = Table(box=None)
    for index, name in enumerate(content.header):
        table.add_column(name, justify="right" if index else "left")
    for row in content.rows:
        table.add_row(*row)
    output.print("rise of the loss against all heads global, nats per token, on each part of the text")
    output.print(table)
    if excess := excess_text(found):
        output.print(excess, markup=False)
    heads = found.heads
    before, after = heads.original_cache_bytes(length, 2), heads.cache_bytes(found.layouts, length, 2)
    output.print(
        f"cache of {length:,} tokens in bf16: {format_bytes(after)}, was {format_bytes(before)} "
        f"({after / before:.1%})",
        markup=False,
    )
