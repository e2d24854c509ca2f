"""The command `longshort export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.huggingface.model_card import is_own_card
from longshort.reporting.console import console
from longshort.training.export import export_run


@dataclass(frozen=True)
class ExportFlags:
    """Write a checkpoint of a run as one folder that `LongShortForCausalLM.from_pretrained` loads, with its
    tokenizer and a model card, README.md: also one that many processes wrote in shards."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to create."""

    step: Annotated[int, Ge(0)] | None = None
    """Step of the checkpoint. None: the latest."""

    overwrite: bool = False
    """Replace OUT if it is a folder with an exported model and nothing else. A README.md that was changed
    since is kept."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(ExportFlags, "export", arguments)
    step = export_run(flags.run, flags.out, step=flags.step, overwrite=flags.overwrite)
    kept = "" if is_own_card(flags.out) else "; its README.md was changed, and is kept"
    console().print(f"step {step} of {flags.run}: {flags.out}{kept}", markup=False)
    return 0
