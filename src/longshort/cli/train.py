"""The command `longshort train`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro
from annotated_types import Ge, Gt
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from longshort.checks import check_fields, flag
from longshort.cli.console import SECONDS_BETWEEN_LINES, console, discard_output
from longshort.cli.errors import UsageError
from longshort.cli.flags import parse
from longshort.model import LongShortConfig, parameter_count, preset
from longshort.training.config import MODEL_SETTINGS, Parallel, TrainConfig
from longshort.training.loop import Progress, resume, train
from longshort.training.metrics import read_metrics
from longshort.training.report import write_report

if TYPE_CHECKING:
    from longshort.training.run import RunConfig

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


class TrainingDisplay(Progress):
    """Shows loss, largest logit, speed and time left: a bar on a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        self.output = console()
        self.is_main = False
        self._bar: Bar | None = None
        self._newest: dict[str, Any] = {}
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_start(self, run: RunConfig, step: int) -> None:
        self.is_main = True
        self._steps, self._first, self._began = run.training.steps, step, time.monotonic()
        self._step = step
        self.on_message(describe_model(run))
        if step:
            self.on_message(f"resuming after step {step}")
        if self.output.is_terminal:
            text = TextColumn("{task.description}")
            self._bar = Bar(
                BarColumn(12), MofNCompleteColumn(), text, TimeRemainingColumn(), console=self.output
            )
            self._task = self._bar.add_task("", total=self._steps, completed=step)
            self._bar.start()

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        self._newest |= record or {}
        if step <= self._step:  # after a rollback
            self._first, self._began = step - 1, time.monotonic()
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=describe_progress(self._newest))
        elif record and (time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / (step - self._first) * (self._steps - step)
            self.on_message(
                f"step {step}/{self._steps}  {describe_progress(self._newest)}  {left:.0f} s left"
            )

    def on_message(self, text: str) -> None:
        try:
            self.output.print(text, markup=False)
        except BrokenPipeError:  # the reader of the output is gone; the training continues
            discard_output()


def describe_model(run: RunConfig) -> str:
    """Describe in one line the parameters of the model and of its twin with the other kind of attention."""
    config = LongShortConfig.from_dict(run.model)
    heads = config.num_attention_heads
    is_mhsa = not any(layout.local_heads for layout in config.head_layouts())
    twin_heads = {"num_global_heads": None if is_mhsa else heads, "local_window": None, "layouts": None}
    twin = LongShortConfig.from_dict({**run.model, **twin_heads})
    kinds = ("MHSA", "LS-attention") if is_mhsa else ("LS-attention", "MHSA")
    return (
        f"{run.training.preset} with {kinds[0]}: {parameter_count(config):,} parameters "
        f"(with {kinds[1]}: {parameter_count(twin):,})"
    )


def describe_progress(record: dict[str, Any]) -> str:
    """Describe loss, validation loss, largest logit, speed and its share of the peak, as far as they are
    known."""
    parts = []
    for name, key, shape in (
        ("loss", "loss", ".4f"),
        ("validation", "validation_loss", ".4f"),
        ("largest logit", "max_logit", ".1f"),
    ):
        if key in record:
            value = record[key]
            is_finite = value is not None and math.isfinite(value)
            parts.append(f"{name} {format(value, shape) if is_finite else 'not finite'}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("mfu"):
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    return "  ".join(parts)
