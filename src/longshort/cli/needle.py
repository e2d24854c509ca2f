"""The command `longshort needle`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from annotated_types import Ge, Le
from rich.table import Table

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.cli.pretrained import Precision, load_for_evaluation
from longshort.conversion.text import read_tokens
from longshort.evaluation import measure_needle
from longshort.reporting.console import console, progress_bar
from longshort.reporting.files import replace_file, require_new_files, strict_json
from longshort.training.config import Seed
from longshort.training.parallel import connect


@dataclass(frozen=True)
class NeedleFlags:
    """Measure how far back a causal language model finds what it has read, by length and depth.

    A line with a random key and value is put into a window of text, and the window ends with the line once
    more. The gain is how much more likely the first line makes the last letters of the second, against a
    window that differs only in the first line's value.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a transformers model and its tokenizer, or its name on the Hugging Face Hub."""

    text: str = "stdlib"
    """Text around the needles: a file, a folder, or another source of `longshort data`."""

    lengths: tuple[Annotated[int, Ge(1)], ...] = (256, 1024)
    """Tokens of the windows."""

    depths: tuple[Annotated[float, Ge(0), Le(1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the needle: 0 before all of the text, 1 right before the question."""

    samples: Annotated[int, Ge(2)] = 8
    """Pairs of windows for each length and depth."""

    seed: Seed = 0
    """Seed of keys, values and text: models that are measured with one seed get the same."""

    json: Path | None = None
    """File for the numbers; it must not exist."""

    dtype: Precision = "auto"
    """Precision of the weights. auto: float32 on a CPU, that of the saved weights on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(NeedleFlags, "needle", arguments)
    require_new_files(flags.json)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        pretrained = load_for_evaluation(flags.model, ranks.device, flags.dtype)
    model, tokenizer = pretrained.model, pretrained.tokenizer
    tokens = read_tokens(flags.text, tokenizer).numpy()
    cells = []
    with progress_bar() as show:
        for index, length in enumerate(flags.lengths):
            show("measuring", index, len(flags.lengths))
            options = {"lengths": [length], "depths": flags.depths, "samples": flags.samples}
            cells += measure_needle(model, tokenizer, tokens, seed=flags.seed, **options).cells
    table = Table(box=None)
    for name in ("tokens", "depth", "distance", "gain (nats per token)", "± error", "found"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            f"{cell.length:,}",
            f"{cell.depth:.0%}",
            f"{cell.distance:,.0f}",
            f"{cell.gain:.2f}",
            f"{cell.gain_error:.2f}",
            f"{cell.accuracy:.0%}",
        )
    output = console()
    output.print(table)
    if flags.json is not None:
        content = {"model": flags.model, "text": flags.text, "seed": flags.seed}
        replace_file(flags.json, strict_json({**content, "cells": [asdict(cell) for cell in cells]}).encode())
        output.print(f"numbers: {flags.json}", markup=False)
    return 0
