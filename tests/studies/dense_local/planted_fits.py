"""Results of the study `dense-local` that nobody fitted, with a planted effect or none."""

from __future__ import annotations

import math
import random

from tests.studies.planted import fill

from longshort.studies.dense_local.study import DenseLocal
from longshort.studies.dense_local.task import Fit, curve_steps, windows_of_grid

STUDY = DenseLocal()


def run_all(run, seeds=3, results=None):
    """Results of the whole plan of the smoke scale, each made by run(trial)."""
    return fill(STUDY, "smoke", range(seeds), run, results)


def make(effect, noise=0.05, best_rate=0.1):
    """Runs a trial by a formula: local losses and logits are `effect`(fit) times global ones, both with noise
    of their own; `best_rate` is the best."""

    def run(trial):
        fit = Fit(**trial.settings)
        rng = random.Random(trial.key)
        factor = 1.0 if fit.window is None else effect(fit)
        off = 1 + abs(math.log(fit.learning_rate / best_rate))
        loss = 0.01 * factor * off * rng.lognormvariate(0, noise)
        return result(fit, loss, 20 * factor * rng.lognormvariate(0, noise))

    return run


def result(fit, loss, max_logit):
    steps = curve_steps(fit.steps)
    made = {
        "loss": loss,
        "max_logit": max_logit,
        "max_logit_in_band": [[window, max_logit] for window in windows_of_grid(fit.span)],
        "row_range": None if max_logit is None else 2 * max_logit,
        "least_loss": 0.0,
        "steps": steps,
        "losses": [loss] * len(steps),
        "max_logits": [max_logit] * len(steps),
    }
    if fit.start_window is not None:
        made["start"] = {"loss": loss, "max_logit": max_logit}
    if fit.to_plateau:
        made["plateau_at"] = 300
    if fit.crop:
        made |= {name: [[0.5] * fit.crop] * fit.crop for name in ("target", "fit")}
    return made
