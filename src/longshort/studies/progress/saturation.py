"""Whether MHSA's logits keep growing without weight decay."""

from __future__ import annotations

import math
from pathlib import Path

from longshort.reporting.intervals import Interval, confidence_interval, log_or_none, slope
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import draw_curves
from longshort.studies.framework.comparison import ArmResults, Arms, interval_text, mean_text
from longshort.studies.language.arms import MHSA
from longshort.studies.language.equal_progress import Result, curve_of
from longshort.studies.progress.arms import NO_DECAY
from longshort.studies.progress.figures import by_cost


def saturation_sections(arms: Arms, folder: Path) -> list[Section]:
    """Compare the late growth of MHSA's logits with and without weight decay, at equal steps.

    Args:
        arms: MHSA with weight decay and without; there is no section until both are measured.
        folder: the folder for the figure.
    """
    if MHSA.name not in arms or NO_DECAY.name not in arms:
        return []
    both = {name: arms[name] for name in (MHSA.name, NO_DECAY.name)}
    until = min(result["constant_until"] for arm in both.values() for result in arm.results())
    growth = {name: late_growth(arm, until) for name, arm in both.items()}
    rows = [
        (
            name,
            str(len(arm.results())),
            *(mean_text(_largest_at(result, share * until) for result in arm.results()) for share in _SHARES),
            interval_text(growth[name]),
        )
        for name, arm in both.items()
    ]
    marks = [f"at step {round(share * until):,}" for share in _SHARES]
    panels = [
        by_cost(both, "Largest logit", "max_logit", "logits"),
        by_cost(both, "Validation loss", "validation_curve", "nats per byte"),
    ]
    return [
        Section(
            "Without weight decay",
            [
                (
                    "Largest logits on the 32 fixed validation windows. The last column is the factor by "
                    f"which they grow while the steps double, over steps {until // 2:,} to {until:,}, all at "
                    "the constant rate."
                ),
                _statement(growth[NO_DECAY.name], growth[MHSA.name]),
            ],
            table=Table(("largest logit", "seeds", *marks, "per doubling"), rows),
            figures=[
                Figure(draw_curves(panels, folder / "saturation.png"), "A line per seed; thick: the mean.")
            ],
        )
    ]


_SHARES = (0.25, 0.5, 0.75, 1.0)


def late_growth(arm: ArmResults, until: int) -> Interval:
    """Compute the factor by which the largest logit grows while the steps double, over the second half of
    the steps up to `until`, over seeds."""
    slopes = []
    for result in arm.results():
        curve = curve_of(result, "max_logit")
        late = [(math.log2(step), log_or_none(value)) for step, value in curve if until / 2 <= step <= until]
        slopes.append(slope(late))
    return confidence_interval(slopes).exp()


def _largest_at(result: Result, step: float) -> float | None:
    """The largest logit at the last measurement up to a step; None if there is none."""
    curve = reversed(curve_of(result, "max_logit"))
    return next((value for at, value in curve if at <= step), None)


def _statement(without: Interval, with_decay: Interval) -> str:
    words = "neither surely grows nor surely falls"
    if without.low > 1:
        words = "keeps growing"
    elif without.high < 1:
        words = "falls"
    return (
        f"Without weight decay the largest logit {words}: by a factor of {interval_text(without)} per "
        f"doubling, with weight decay by {interval_text(with_decay)}. There is no verdict, which "
        f"{without.count} seeds could hardly carry."
    )
