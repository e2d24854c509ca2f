"""Retrieval of a needle by the models of the pair, on their last weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longshort.reporting.page import Section, Table
from longshort.studies.framework.comparison import mean_text
from longshort.studies.framework.study import Trial, Workplace
from longshort.studies.language.trial import needle_cells, trained_run

Needles = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of `run_needle`, one per seed, by the name of their arm."""


def run_needle(trial: Trial, workplace: Workplace) -> dict[str, Any]:
    """Measure retrieval by the last weights of a training, which is trained if it is not finished.

    Raises:
        InterruptedError: the training was stopped by a signal, after it wrote a checkpoint.
    """
    with trained_run(trial.settings, workplace) as run:
        return {"needle": needle_cells(run, trial.settings["needle"], workplace)}


def needle_sections(needles: Needles) -> list[Section]:
    """Make the table of gains by arm, length and depth; none without results."""
    if not needles:
        return []
    places = [(cell["length"], cell["depth"]) for cell in next(iter(needles.values()))[0]["needle"]]
    rows = [
        (name, *(mean_text(_gain(result, place) for result in results) for place in places))
        for name, results in needles.items()
    ]
    header = ("", *(f"{length:,} tokens, depth {depth:g}" for length, depth in places))
    text = (
        "How much more likely, in nats per byte, a random string becomes when it stood earlier in the text, "
        "by the length of the text and the needle's depth in it (0: at the beginning); models are not "
        "trained on that task. Means over seeds, on the last weights."
    )
    return [Section("Needle", [text], table=Table(header, rows))]


def farthest_gain(result: Mapping[str, Any]) -> float:
    """Return the gain at the largest distance: the longest text, the needle nearest to its beginning."""
    return max(result["needle"], key=lambda cell: (cell["length"], -cell["depth"]))["gain"]


def _gain(result: Mapping[str, Any], place: tuple[int, float]) -> float:
    return next(cell["gain"] for cell in result["needle"] if (cell["length"], cell["depth"]) == place)
