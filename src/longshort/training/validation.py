"""The measurements of a run on validation windows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from longshort.stability import AttentionProbe
from longshort.training.job import Job
from longshort.training.optimization import Objective, validation_loss
from longshort.training.parallel import Ranks


class Validation:
    """Measures the validation loss and, with the setting `probe`, attention and copying too.

    Args:
        job: the run, with windows.
        objective: the model of the run with its losses.
        ranks: the processes.
    """

    def __init__(self, job: Job, objective: Objective, ranks: Ranks) -> None:
        self._job, self._objective, self._ranks = job, objective, ranks
        self._probe = AttentionProbe(job.model, job.run.band) if job.run.training.probe else None

    def measure(self) -> dict[str, Any]:
        """Return the entries of a line of metrics; see `longshort.training.metrics`."""
        found: dict[str, Any] = {}
        with nullcontext() if self._probe is None else self._probe.observing():
            found["validation_loss"] = self._loss(self._job.windows)
        if self._probe is not None:
            found["probe"] = self._probe.reading(self._ranks.reduce_max, self._ranks.reduce_mean).as_metrics()
        if self._job.copying is not None:
            found["copying_loss"] = self._loss(self._job.copying)
        return found

    def _loss(self, windows: Any) -> float:
        return validation_loss(self._objective, windows, self._job.run.training, self._ranks)
