"""Results of the study `progress` that nobody trained, with a planted effect or none."""

from __future__ import annotations

from typing import Any

from tests.studies.planted import noise

from longshort.model import training_flops
from longshort.stability import ALARMS
from longshort.stability.rounding import AUDITED
from longshort.studies.language.arms import model_config


def planted(speed=lambda trial: 1.0, logit=lambda trial, loss: 10.0, end=1.2, copies=True, diverged=None):
    """Results of runs whose loss falls in a line from 3 to `end`, `speed` times as fast.

    `logit` gives the largest logit at a loss; the row range is twice as large.
    """

    def result_of(trial) -> dict[str, Any]:
        if "audit" in trial.settings:
            return audit()
        if "needle" in trial.settings:
            return {"needle": [{"length": 64, "depth": 0.5, "gain": 0.25, "accuracy": 0.5}]}
        training = trial.settings["train"]
        steps, length = training["steps"], training["sequence_length"]
        config = model_config(trial.settings["model"], training)
        marks = [max(1, round(steps * share / 40)) for share in range(1, 41)]
        pace = speed(trial) * (1 + 0.01 * noise(trial))
        losses = [max(end, 3.0 - (3.0 - 1.2) * pace * step / (0.9 * steps)) for step in marks]
        sizes = [logit(trial, loss) * (1 + 0.01 * noise(trial)) for loss in losses]
        series = {"max_logit": sizes, "max_logit_in_band": sizes, "quantile": sizes}
        copying = [[step, 1.0 if copies and step > steps / 2 else 3.0] for step in marks]
        return {
            "flops_per_step": training_flops(config, length).total * training["batch_size"],
            "tokens_per_step": length * training["batch_size"],
            "constant_until": steps - training["decay_steps"],
            "constant_loss": losses[-5],
            "validation_loss": losses[-1],
            "validation_curve": [list(point) for point in zip(marks, losses, strict=True)],
            "copying_curve": copying,
            "probe": {"step": marks, **series, "row_range": [2 * size for size in sizes]},
            "diverged_at": diverged(trial) if diverged else None,
            **(_alarms(steps, diverged(trial) if diverged else None) if "alarms" in training else {}),
            "timing": {},
        }

    return result_of


def _alarms(steps, diverged_at):
    """Scores that rise 200 steps before a loss does."""
    onset = None if diverged_at is None else diverged_at - 99
    marks = range(10, steps + 1, 10)
    scores = [float(onset is not None and step >= onset - 200) for step in marks]
    return {"diverged_from": onset, "alarm_scores": {"step": list(marks), **dict.fromkeys(ALARMS, scores)}}


def audit(bias=lambda precision, matrix: 0.0):
    """An audit of two layers, with a bias by precision and matrix."""
    return {
        "step": 1,
        "left_out": {},
        "errors": [
            {
                "precision": precision, "layer": layer, "matrix": matrix, "bias": bias(precision, matrix),
                "bias_error": 1e-3, "noise": 0.05, "mean_error": 1.0,
            }
            for precision in AUDITED
            for layer in range(2)
            for matrix in ("q", "k")
        ],
    }  # fmt: skip
