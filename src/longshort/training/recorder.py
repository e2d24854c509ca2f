"""The measurements of a step, and its line of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longshort.stability import MAX_LOGITS, Measurements, Reading
from longshort.training.checkpoints import TrainState
from longshort.training.config import TrainConfig
from longshort.training.metrics import MetricsLog
from longshort.training.progress import Progress
from longshort.training.validation import Validation


@dataclass(frozen=True)
class Taken:
    """A step that was taken; what is on the device was not waited for.

    Attributes:
        loss_and_norm: (2,), on this rank.
        learning_rate: learning rate of the step.
        measurements: the monitor's, over all ranks; None if nothing was measured.
        is_monitored: whether they are meant for the metrics, and not for QK-clip alone.
        clipped: heads that QK-clip scaled, a scalar; None without it.
    """

    loss_and_norm: Tensor
    learning_rate: float
    measurements: Measurements | None
    is_monitored: bool
    clipped: Tensor | None


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether a task for every `every` steps (0: none) and the last one is due on this step."""
    return every > 0 and (step % every == 0 or step == last)


class Recorder:
    """Makes the lines of a run's metrics, and reports the first loss that is not finite.

    Args:
        settings: settings of the run.
        log: receives the lines; None on all processes but the main one.
        progress: receives messages for the user.
        validation: measures on validation windows; None if there are none.
        seconds_at_peak: the least seconds that a token can take, for `mfu`; None: unknown.

    Attributes:
        is_at_goal: whether the last line has a validation loss at which the run is to end.
    """

    def __init__(
        self,
        settings: TrainConfig,
        log: MetricsLog | None,
        progress: Progress,
        validation: Validation | None,
        seconds_at_peak: float | None,
    ) -> None:
        self._settings, self._log, self._progress = settings, log, progress
        self._validation, self._seconds_at_peak = validation, seconds_at_peak
        self.is_at_goal = False

    def begin(self, state: TrainState) -> None:
        """Continue after the steps that are done."""
        self._was_finite = True
        self.start_interval()
        self._max_logits: dict[str, Any] = {}  # as last measured
        self.is_at_goal = False
        if self._log is not None:
            last_line = self._log.begin(state.step, self._settings.tensorboard, state.attempt) or {}
            self._max_logits = {name: last_line[name] for name in MAX_LOGITS if name in last_line}
            self.is_at_goal = self._is_at_goal(last_line)

    def add_tokens(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside, such as that of a checkpoint, out of the speed, which is that of training
        alone. Before it, the device must have been waited for."""
        self._seconds = self._training_seconds()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def start_interval(self) -> None:
        """Measure the speed from now on."""
        self._tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def _training_seconds(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    def is_due(self, step: int, taken: Taken) -> bool:
        """Return whether the step has a line."""
        settings = self._settings
        intervals = (settings.log_every, settings.evaluate_every)
        return taken.is_monitored or any(is_due(step, every, settings.steps) for every in intervals)

    def write(
        self,
        state: TrainState,
        taken: Taken,
        reading: Reading | None,
        loss: float,
        norm: float,
        spike: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Write the line of a step and return it; see `longshort.training.metrics`.

        Args:
            state: the state after the step.
            taken: the step, which the device has done.
            reading: what was measured, if anything was.
            loss, norm: the means over all ranks.
            spike: the entry of a spike.
        """
        speed = self._tokens / self._training_seconds()
        record: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "learning_rate": taken.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": speed,
        }
        if self._seconds_at_peak is not None:
            record["mfu"] = speed * self._seconds_at_peak
        measured: dict[str, Any] = {}
        if taken.is_monitored and reading is not None:
            measured = reading.as_metrics()
            self._max_logits = {name: measured[name] for name in MAX_LOGITS}
        record |= self._max_logits | measured
        settings = self._settings
        if self._validation is not None and is_due(state.step, settings.evaluate_every, settings.steps):
            record |= self._validation.measure()
        self.is_at_goal = self._is_at_goal(record)
        if taken.clipped is not None:
            record["qk_clipped"] = int(taken.clipped)
        if state.attempt:
            record["attempt"] = state.attempt
        if spike is not None:
            record["spike"] = spike
        if self._log is not None:
            self._log.write(record)
            self._report_divergence(record)
        self.start_interval()  # without validation and the line itself
        return record

    def _is_at_goal(self, record: dict[str, Any]) -> bool:
        goal, loss = self._settings.stop_at_loss, record.get("validation_loss")
        return goal is not None and loss is not None and loss <= goal

    def _report_divergence(self, record: dict[str, Any]) -> None:
        is_finite = math.isfinite(record["loss"])
        if self._settings.on_spike is None and self._was_finite and not is_finite:
            self._progress.on_message(f"the loss is not finite at step {record['step']}; the run continues")
        self._was_finite = is_finite
