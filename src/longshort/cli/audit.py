"""The command `longshort audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from annotated_types import Ge
from rich.table import Table

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.reporting.console import console, progress_bar
from longshort.reporting.files import replace_file, require_new_files, strict_json
from longshort.training.audit import Split, audit_trained
from longshort.training.config import AttentionPrecision, Seed
from longshort.training.parallel import connect
from longshort.training.run import open_same_data
from longshort.training.trained import open_trained

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class AuditFlags:
    """Measure what rounding inside attention does to the gradients of a trained model, in each precision.

    On the same batches, the gradients of the weights of queries and keys are computed with attention in each
    precision and in fp64, everything else as in the training. The error is told apart into bias, which is the
    same in all batches, and noise, which differs. The run is only read.

    bias: mean of <error, true gradient> / |true gradient|², with its standard error.
    noise: deviation of the errors from their mean, relative to the mean of the true gradients.
    mean error: size of the mean error in standard errors; about 1 if there is only noise.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""

    checkpoint: Annotated[int, Ge(0)] | None = None
    """Step of the checkpoint. None: the latest."""

    data: Path | None = None
    """Folder of the data, if it was moved. None: that of the run."""

    split: Split = "train"
    """Tokens that the batches are drawn from."""

    batches: Annotated[int, Ge(2)] = 8
    """Number of batches."""

    batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per batch. None: as many as in a forward pass of the training."""

    seed: Seed = 0
    """Seed of the batches."""

    precisions: tuple[AttentionPrecision, ...] | None = None
    """Precisions to measure. None: fp32, bf16, bf16-flash and, if the model allows it, sdpa-bf16."""

    json: Path | None = None
    """File for the numbers; it must not exist."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(AuditFlags, "audit", arguments)
    require_new_files(flags.json)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        trained = open_trained(flags.run, ranks.device, flags.checkpoint)
    data = open_same_data(trained.config, flags.data)
    with progress_bar() as show:
        found = audit_trained(
            trained,
            data,
            split=flags.split,
            batches=flags.batches,
            batch_size=flags.batch_size,
            seed=flags.seed,
            precisions=flags.precisions,
            progress=lambda done, total: show("auditing", done, total),
        )
    output = console()
    _print(output, found)
    if flags.json is not None:
        content = {"run": str(flags.run.absolute()), "data": str(data.path.absolute()), **found}
        replace_file(flags.json, strict_json(content).encode())
        output.print(f"numbers: {flags.json}", markup=False)
    return 0


def _print(output: Console, found: dict[str, Any]) -> None:
    output.print(
        f"gradients after step {found['step']:,} on {found['batches']} batches of {found['batch_size']} "
        f"sequences of {found['sequence_length']:,} tokens ({found['split']}), against attention in fp64",
        markup=False,
    )
    table = Table(box=None)
    for name in ("attention", "layer", "matrix", "bias", "± error", "noise", "mean error"):
        table.add_column(name, justify="left" if name in ("attention", "matrix") else "right")
    for error in found["errors"]:
        table.add_row(
            error["precision"],
            str(error["layer"]),
            error["matrix"].upper(),
            f"{error['bias']:+.1e}",
            f"{error['bias_error']:.1e}",
            f"{error['noise']:.1e}",
            f"{error['mean_error']:.2f}",
        )
    output.print(table)
    for name, reason in found["left_out"].items():
        output.print(f"{name} is left out: {reason}", markup=False)
