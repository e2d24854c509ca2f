"""The display of a training: what `longshort train` shows, also for scripts and notebooks."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Self

from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from longshort.model import LongShortConfig, parameter_count
from longshort.reporting.console import (
    SECONDS_BETWEEN_LINES,
    NotebookLine,
    bar_columns,
    console,
    flexible_column,
    has_bars,
    in_notebook,
)
from longshort.reporting.stdout import discard_output
from longshort.training.progress import Progress

if TYPE_CHECKING:
    from longshort.training.run import RunConfig


class TrainingDisplay(Progress):
    """Shows loss, largest logit, speed and time left: a bar on a terminal, a line in a notebook that is
    replaced, occasional lines elsewhere.

        with TrainingDisplay() as progress:
            train(settings, progress=progress)

    Attributes:
        output: the console that it prints to, stdout.
        is_main: whether this process shows the training: it has begun, and no other process does.
    """

    def __init__(self) -> None:
        self.output = console()
        self.is_main = False
        self._bar: Bar | None = None
        self._line: NotebookLine | None = None
        self._newest: dict[str, Any] = {}
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._line is not None:
            self._line.flush()

    def on_start(self, run: RunConfig, step: int) -> None:
        self.is_main = True
        self._steps, self._first, self._began = run.training.steps, step, time.monotonic()
        self._step = step
        self.on_message(describe_model(run))
        if step:
            self.on_message(f"resuming after step {step}")
        if in_notebook():
            self._line = NotebookLine()
        elif has_bars(self.output):
            columns = (*bar_columns(self.output, 12), MofNCompleteColumn(), flexible_column())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=self.output, expand=True)
            self._task = self._bar.add_task("", total=self._steps, completed=step)
            self._bar.start()

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        self._newest |= record or {}
        if step <= self._step:  # after a rollback
            self._first, self._began = step - 1, time.monotonic()
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=describe_progress(self._newest))
        elif self._line is not None:
            self._line.show(self._describe(step))
        elif record and (time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = time.monotonic()
            self.on_message(self._describe(step))

    def _describe(self, step: int) -> str:
        left = (time.monotonic() - self._began) / (step - self._first) * (self._steps - step)
        return f"step {step}/{self._steps}  {describe_progress(self._newest)}  {left:.0f} s left"

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
