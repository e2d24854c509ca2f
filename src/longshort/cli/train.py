"""The command `longshort train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Gt

from longshort.checks import check_fields, flag
from longshort.cli.errors import UsageError
from longshort.cli.flags import parse
from longshort.model import preset
from longshort.training.config import MODEL_SETTINGS, Parallel, TrainConfig
from longshort.training.display import TrainingDisplay
from longshort.training.loop import resume, train
from longshort.training.metrics import read_metrics
from longshort.training.report import write_report

_DESCRIPTION = """Train a model on a folder that `longshort data` wrote.

Settings of the model that are left out are the preset's. `longshort train --resume RUN` resumes a run from
its latest checkpoint; `longshort train --resume RUN --help` explains it."""
_RESUME_DESCRIPTION = "Resume a run from its latest checkpoint, with its own settings."
_GO_ONLY_WITH = {
    "rollback_steps": ("on_spike", "rollback"),
    "skip_batches": ("on_spike", "rollback"),
    "max_rollbacks": ("on_spike", "rollback"),
    "interleave": ("token_order", "interleaved"),
}
"""Settings that have no effect unless another one has this value."""


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    preset: Annotated[str, tyro.conf.Positional]
    """Model to start from: tiny, paper-small, paper-base, paper-large, or a JSON file (*.json) with fields of
    LongShortConfig, such as {"preset": "tiny", "num_global_heads": [0, 4]}."""

    qk_norm: bool = False
    """Normalize queries and keys per head."""

    sink_logits: bool = False
    """Learn a logit per head that joins the softmax's denominator, as in gpt-oss."""


@dataclass(frozen=True)
class ResumeFlags:
    resume: Path
    """Folder of the run."""

    steps: Annotated[int, Ge(1)] | None = None
    """New number of steps; the schedule of the learning rate does not change."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads from now on; another number may change the last bits of the losses."""

    data: Path | None = None
    """New path of the data folder, if it was moved."""

    parallel: Parallel | None = None
    """New way of several processes. Their number may be another one in any case, if it divides the batch."""

    shards: Annotated[int, Ge(1)] | None = None
    """New number of processes among which the model is cut."""

    context_parallel: Annotated[int, Ge(1)] | None = None
    """New number of processes that share each sequence."""

    timeout: Annotated[float, Gt(0)] | None = None
    """New number of seconds for which a process waits for the others."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    with TrainingDisplay() as display:
        if any(argument.partition("=")[0] == "--resume" for argument in arguments):
            flags = parse(ResumeFlags, "train", arguments, _RESUME_DESCRIPTION)
            outcome = resume(
                flags.resume,
                steps=flags.steps,
                threads=flags.threads,
                data=flags.data,
                parallel=flags.parallel,
                shards=flags.shards,
                context_parallel=flags.context_parallel,
                timeout=flags.timeout,
                progress=display,
            )
        else:
            outcome = train(parse_settings(arguments), progress=display)
    if display.is_main and read_metrics(outcome.run):
        display.on_message(f"report: {write_report(outcome.run)}")
    return outcome.exit_code


def parse_settings(arguments: list[str]) -> TrainConfig:
    """Parse the arguments of `longshort train`, without `--resume`, into settings.

    Raises:
        SystemExit: with 2 and a message on stderr, if a flag or its value is wrong.
        UsageError: two flags, or a flag and the preset, do not fit.
    """
    flags = parse(TrainFlags, "train", arguments, _DESCRIPTION)
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for name, (other, value) in _GO_ONLY_WITH.items():
        found = getattr(flags, other)
        if flag(name) in given and found != value:
            raise UsageError(f"{flag(name)} goes only with {flag(other)} {value}, got {found}")
    values = {field.name: getattr(flags, field.name) for field in fields(TrainConfig)}
    # A switch of the model that is not given has the value of the preset.
    values |= {name: None for name in MODEL_SETTINGS if values[name] is False}
    settings = TrainConfig(**values)
    try:
        preset(settings.preset, mhsa=settings.mhsa, **settings.model_overrides())
    except ValueError as error:
        raise UsageError(str(error)) from None
    return settings
