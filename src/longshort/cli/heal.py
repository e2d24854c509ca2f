"""The command `longshort heal`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from annotated_types import Ge
from rich.table import Table

from longshort.cli.flags import parse
from longshort.conversion.healing import Healing, HealSettings, heal
from longshort.conversion.reports import healing_rows, unreported_healing, write_healing
from longshort.reporting.console import console, progress_bar
from longshort.training.parallel import connect

if TYPE_CHECKING:
    from longshort.conversion.short_training import Progressed


@dataclass(frozen=True)
class HealFlags(HealSettings):
    """Train a converted model for a short time, until it has regained its loss on held-out text.

    The state of the training and a report with the curve are written to MODEL/healing. When the loss is
    regained or the budget is used up, the healed weights replace those of MODEL; the old ones are kept in
    MODEL/unhealed. After Ctrl-C the same command resumes the training.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the converted model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""


def run(arguments: list[str]) -> int:
    flags = parse(HealFlags, "heal", arguments)
    healing = unreported_healing(flags.model) or _heal(flags)
    output = console()
    table = Table(box=None)
    for index, name in enumerate(("held-out loss", "nats per token", "above the original")):
        table.add_column(name, justify="right" if index else "left")
    for row in healing_rows(healing):
        table.add_row(*row)
    output.print(table)
    page = write_healing(flags.model, healing)
    if not healing.is_complete:
        output.print("interrupted; the same command resumes", markup=False)
        return 130
    output.print(
        f"{healing.healed.step:,} steps in {healing.healed.seconds / 60:.1f} minutes\n"
        f"model:  {flags.model} (before: {flags.model / 'unhealed'})\nreport: {page}",
        markup=False,
    )
    return 0


def _heal(flags: HealFlags) -> Healing:
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks, progress_bar() as show:

        def report(name: str, now: Progressed) -> None:
            if now.planned is None:
                show(name, now.step, None)
            else:
                show(f"{name}, loss {now.last_held_out:.3f}" if now.lines else name, now.step, now.planned)

        return heal(flags, ranks.device, report)
