"""The claims of the study `dense-local`, and the rules by which they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longshort.reporting.intervals import Interval, paired_log_ratio
from longshort.studies.dense_local_arms import LOSS_FLOOR, Pair, Sweep, pairs, sweep, trial_of
from longshort.studies.dense_local_task import Fit
from longshort.studies.study import Claim, Outcome, Results, Scale, Verdict, weaker

_RULE = (
    "In each combination of l'/d (½, 1, 4) and w/l' (½, 1, 2, 4) the 95 % interval over paired seeds of the "
    "log of {quantity}, local over global, each at its best rate, speaks for the claim if it lies below 0, "
    "against it if above 0. Shown: for it in all combinations. Contradicted: against it in more than half. "
    "Partly shown: for it in at least half, and not contradicted. Else not shown. The weaker outcome of best "
    "rates and next lower rates counts. Windows narrower than the dependency (w < l') cannot reach the "
    "target and count as all others do."
)

CLAIMS = (
    Claim(
        "F2a,b",
        "Global attention draws O(n²) scores from O(n·d) degrees of freedom, local attention O(n·l') scores.",
        "None: it is counting.",
        "Illustrated: target and fits are drawn from measured numbers; there is no verdict.",
    ),
    Claim(
        "F2c",
        "On a dense local dependency local attention reaches a lower training loss than global attention.",
        "Global attention reaches as low a loss, or a lower one, with other spans or windows than "
        "l' = d = w, where local attention wins by counting alone.",
        _RULE.format(quantity=f"final losses (at least {LOSS_FLOOR:g} nats, fp32's noise)"),
    ),
    Claim(
        "F2d",
        "On a dense local dependency local attention resists the explosion of logits.",
        "Local attention's largest logit grows as large as global attention's.",
        _RULE.format(quantity="largest logits at the end"),
    ),
)


@dataclass(frozen=True)
class Side:
    """One arm of a comparison.

    Attributes:
        arm: which.
        sweep: of its rate.
        by_seed: its results at the rate that is compared.
    """

    arm: Fit
    sweep: Sweep
    by_seed: Mapping[int, Mapping[str, Any]]

    def values(self, quantity: str) -> dict[int, float | None]:
        """By seed; losses are `LOSS_FLOOR` at least."""
        values = {seed: result[quantity] for seed, result in self.by_seed.items()}
        if quantity != "loss":
            return values
        return {seed: None if value is None else max(value, LOSS_FLOOR) for seed, value in values.items()}

    def in_band(self, window: int) -> dict[int, float | None]:
        """By seed the largest logit inside a window; a number for the windows that were kept."""
        return {seed: dict(result["max_logit_in_band"]).get(window) for seed, result in self.by_seed.items()}


@dataclass(frozen=True)
class Comparison:
    """A pair as far as results go: log ratios local / other over paired seeds."""

    pair: Pair
    local: Side
    other: Side

    def log_ratio(self, quantity: str) -> Interval:
        """Of "loss", "max_logit" or "row_range"."""
        return paired_log_ratio(self.local.values(quantity), self.other.values(quantity))


def compare(pair: Pair, seeds: Sequence[int], results: Results, lower: int = 0) -> Comparison | None:
    """A pair with each arm so many rungs below its best rate; None until both are run on all seeds."""
    sides = []
    for arm in (pair.local, pair.other):
        search = sweep(arm, results, seeds[0])
        if search.best is None:
            return None
        keys = {seed: trial_of(arm, search.best - lower, seed).key for seed in seeds}
        if any(key not in results for key in keys.values()):
            return None
        sides.append(Side(arm, search, {seed: results[key] for seed, key in keys.items()}))
    return Comparison(pair, *sides)


def grid_comparisons(
    scale: Scale, seeds: Sequence[int], results: Results, lower: int = 0
) -> list[Comparison | None]:
    """Of all combinations, in the order of the plan."""
    grid = [pair for pair in pairs(scale) if pair.topic == "grid"]
    return [compare(pair, seeds, results, lower) for pair in grid]


def judge(intervals: Sequence[Interval | None]) -> Outcome:
    """The rule, for the log ratios (local / global) of all combinations at one choice of rates."""
    known = [interval for interval in intervals if interval is not None]
    if not known or len(known) < len(intervals) or any(interval.count < 2 for interval in known):
        return Outcome.NOT_MEASURED
    speak_for, against = speaking(known)
    if speak_for == len(known):
        return Outcome.SHOWN
    if 2 * against > len(known):
        return Outcome.CONTRADICTED
    return Outcome.PARTLY if 2 * speak_for >= len(known) else Outcome.NOT_SHOWN


def speaking(intervals: Sequence[Interval]) -> tuple[int, int]:
    """How many speak for local attention, and how many against it."""
    return sum(interval.high < 0 for interval in intervals), sum(interval.low > 0 for interval in intervals)


def verdicts(scale: Scale, seeds: Sequence[int], results: Results) -> list[Verdict]:
    """One per claim, by its rule."""
    drawn, *judged = CLAIMS
    by_rate = [grid_comparisons(scale, seeds, results, lower) for lower in (0, 1)]
    found = [Verdict(drawn, Outcome.ILLUSTRATED, "Target, global fit and local fit are drawn below.")]
    for claim, quantity in zip(judged, ("loss", "max_logit"), strict=True):
        rows = [[cell and cell.log_ratio(quantity) for cell in cells] for cells in by_rate]
        best, lower = (judge(row) for row in rows)
        found.append(Verdict(claim, weaker(best, lower), _evidence(quantity, rows)))
    return found


def _evidence(quantity: str, rows: Sequence[Sequence[Interval | None]]) -> str:
    """In one sentence."""
    word = {"loss": "loss", "max_logit": "largest logit"}[quantity]
    parts = []
    for row, rates in zip(rows, ("best rates", "next lower rates"), strict=True):
        known = [interval for interval in row if interval is not None]
        speak_for, against = speaking(known)
        parts.append(f"at {rates} lower in {speak_for} and higher in {against}")
        if len(known) < len(row):
            parts[-1] += f", {len(row) - len(known)} not run"
    return f"Local attention's {word}, of {len(rows[0])} combinations: {'; '.join(parts)}."
