"""Results that nobody trained: what a study says of them is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg

from longshort.model import training_flops
from longshort.reporting.page import Table
from longshort.studies.framework.study import Findings, Scale, Study, Trial
from longshort.studies.language.arms import model_config


def fill(
    study: Study,
    scale: Scale,
    seeds: Sequence[int],
    result_of: Callable[[Trial], Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Mapping[str, Any]]:
    """Results for the whole plan, also for trials that are known only when others are done."""
    results = dict(results or {})
    while True:
        left = [trial for trial in study.plan(scale, seeds, results).trials if trial.key not in results]
        if not left:
            return results
        for trial in left:
            results[trial.key] = result_of(trial)


def findings_of(
    study: Study, scale: Scale, seeds: Sequence[int], results: Mapping[str, Mapping[str, Any]], folder: Path
) -> Findings:
    """The study's findings, with empty files for its pictures: to draw them takes most of the time, and the
    tests that run every study do so."""
    with patch.object(FigureCanvasAgg, "print_png"):
        return study.findings(scale, seeds, results, folder)


def outcomes(findings: Findings) -> dict[str, str]:
    return {verdict.claim.id: verdict.outcome.value for verdict in findings.verdicts}


def table_of(findings: Findings, heading: str) -> Table:
    """The table of the one section with this heading."""
    (table,) = [section.table for section in findings.sections if section.heading == heading]
    assert table is not None
    return table


def judge(
    study: Study,
    scale: Scale,
    result_of: Callable[[Trial], Mapping[str, Any]],
    folder: Path,
    seeds: Sequence[int] = range(3),
) -> dict[str, str]:
    """Outcomes by claim for planted results; every figure is made."""
    folder.mkdir(parents=True, exist_ok=True)
    found = findings_of(study, scale, seeds, fill(study, scale, seeds, result_of), folder)
    for section in found.sections:
        assert all(figure.file.is_file() for figure in section.figures)
    return outcomes(found)


def noise(trial: Trial) -> float:
    """Between -1 and 1, another for each arm and seed; the same for equal settings."""
    return int(trial.key, 16) % 2001 / 1000 - 1


def language_result(
    trial: Trial, *, loss: float, max_logit: float, diverged_at: int | None = None
) -> dict[str, Any]:
    """Return a result like one of `summarize`, whose logits grow as the root of the steps."""
    training = trial.settings["train"]
    steps = training["steps"]
    config = model_config(trial.settings["model"], training)
    marks = [max(1, round(steps * share / 20)) for share in range(1, 21)]
    logits = [[step, max_logit * (step / steps) ** 0.5] for step in marks]
    result = {
        "parameters": 1000,
        "flops_per_step": training_flops(config, training["sequence_length"]).total * training["batch_size"],
        "tokens_per_step": training["sequence_length"] * training["batch_size"],
        "loss": loss,
        "validation_loss": loss,
        "diverged_at": diverged_at,
        "spikes": 0,
        "max_logit": max_logit,
        "max_logit_local": max_logit,
        "max_logit_global": max_logit,
        "max_logit_in_band": max_logit,
        "row_range": 2 * max_logit,
        "max_logit_by_head": [
            [step, [[value] * config.num_attention_heads] * config.num_hidden_layers]
            for step, value in logits
        ],
        "validation_curve": [[step, loss + 2 * (1 - step / steps)] for step in marks],
        "loss_curve": [[step, loss + 2 * (1 - step / steps)] for step in marks],
        "logit_curves": dict.fromkeys(
            ("max_logit", "max_logit_local", "max_logit_in_band", "row_range"), logits
        ),
        "timing": {"tokens_per_second": 40_000.0},
    }
    needle = trial.settings.get("measure", {}).get("needle")
    if needle is not None:
        result["needle"] = [
            {"length": length, "depth": depth, "gain": 0.1, "accuracy": 0.2}
            for length in needle["lengths"]
            for depth in needle["depths"]
        ]
    return result


def swept(trial: Trial, best: float = 3e-3) -> float:
    """What a rate other than the best costs, in nats."""
    rate = trial.settings["train"]["learning_rate"]
    return 0.0 if rate == best else 0.3
