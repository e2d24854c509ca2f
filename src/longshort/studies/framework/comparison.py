"""Comparison of arms over paired seeds, at their best rates and at the next lower ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longshort.reporting.intervals import Interval, confidence_interval, paired_difference, paired_log_ratio
from longshort.reporting.page import number
from longshort.studies.framework.study import Outcome, Results, Verdict
from longshort.studies.framework.sweep import RATES, Arm, Rate, Sweep, sweep


@dataclass(frozen=True)
class ArmResults:
    """The main trials of an arm.

    Attributes:
        arm: the arm.
        sweep: sweep of its learning rates.
        by_rate: results by rate and seed; a rate is in it once it was run on all seeds.
    """

    arm: Arm
    sweep: Sweep
    by_rate: Mapping[Rate, Mapping[int, Mapping[str, Any]]]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of its first trial at the best rate."""
        return self.arm.trial(self.sweep.best, next(iter(self.by_rate["best"]))).settings

    def results(self, rate: Rate = "best") -> list[Mapping[str, Any]]:
        """Return the results of the arm, one per seed."""
        return list(self.by_rate[rate].values())

    def values(self, quantity: str, rate: Rate = "best") -> dict[int, float | None]:
        """Return a number of the results by seed, None if it was not finite; losses are at least the ladder's
        floor."""
        values = {seed: result.get(quantity) for seed, result in self.by_rate[rate].items()}
        if quantity == self.arm.ladder.loss:
            floor = self.arm.ladder.floor
            values = {seed: None if value is None else max(value, floor) for seed, value in values.items()}
        return values

    def mean(self, quantity: str) -> float:
        """Compute the mean over seeds at the best rate; NaN if a value was not finite."""
        return confidence_interval(self.values(quantity).values()).mean


Arms = Mapping[str, ArmResults]
"""Measured arms by name."""


def measure(
    arm: Arm, seeds: Sequence[int], results: Results, rates: Sequence[Rate] = RATES
) -> ArmResults | None:
    """Collect the main trials of an arm; None until they are done at all of `rates`."""
    found = sweep(arm, results, seeds[0])
    if not found.is_done:
        return None
    by_rate = {}
    for rate in RATES:
        keys = {seed: arm.trial(found.rate(rate), seed).key for seed in seeds}
        if all(key in results for key in keys.values()):
            by_rate[rate] = {seed: results[key] for seed, key in keys.items()}
    return ArmResults(arm, found, by_rate) if by_rate.keys() >= set(rates) else None


def measure_arms(
    arms: Iterable[Arm], seeds: Sequence[int], results: Results, rates: Sequence[Rate] = RATES
) -> dict[str, ArmResults]:
    """Collect the arms, by name, whose main trials are done at all of `rates`."""
    measured = {arm.name: measure(arm, seeds, results, rates) for arm in arms}
    return {name: arm for name, arm in measured.items() if arm is not None}


def log_ratio(first: ArmResults, second: ArmResults, quantity: str, rate: Rate = "best") -> Interval:
    """Compute the paired log-ratio of a number of two arms, each at its own rate."""
    return paired_log_ratio(first.values(quantity, rate), second.values(quantity, rate))


def ratio(first: ArmResults, second: ArmResults, quantity: str) -> Interval:
    """Compute the paired ratio of a number of two arms, each at its best rate."""
    return log_ratio(first, second, quantity).exp()


def difference(first: ArmResults, second: ArmResults, quantity: str, rate: Rate = "best") -> Interval:
    """Compute the paired difference of a number of two arms, each at its own rate."""
    return paired_difference(first.values(quantity, rate), second.values(quantity, rate))


def holm(verdicts: Sequence[Verdict], pending: int) -> list[Verdict]:
    """Correct the verdicts of one study for their number (Holm, 1979).

    The k-th smallest of m p-values becomes (m − k + 1) times as large, and at least as large as those before
    it. A verdict that says something and whose p-value is then above 0.05 is not shown. A claim with a
    `partly_p` is tested for that first: if only this test passes, the claim is partly shown. It counts as one
    test until both are done.

    Args:
        verdicts: the verdicts of all claims of the study.
        pending: number of claims whose trials are not done yet. They count as tests, so that no verdict whose
            own trials are done is taken back when those of others are.
    """
    waiting = {verdict.claim.id: tests for verdict in verdicts if (tests := _tests(verdict))}
    words = f"{len(waiting) + pending} test{'s' if len(waiting) + pending > 1 else ''}"
    corrected = {verdict.claim.id: verdict for verdict in verdicts}
    passed: set[str] = set()
    highest = 0.0
    while waiting:
        claim = min(waiting, key=lambda name: waiting[name][0][1])
        outcome, p = waiting[claim].pop(0)
        highest = max(highest, min(1.0, (len(waiting) + pending) * p))
        verdict = corrected[claim]
        if not outcome.is_claim or highest <= 0.05:
            passed.add(claim)
            verdict = replace(verdict, outcome=outcome, p=highest)
        else:
            text = (
                f" The outcome {outcome.value!r} does not stand: its p-value, {p:.2g}, is {highest:.2g} "
                f"after Holm's correction for {words}."
            )
            verdict = replace(verdict, evidence=verdict.evidence + text)
            if claim not in passed:
                failed = f"; {outcome.value!r} fails Holm's correction, p = {highest:.2g}"
                here = verdict.here and verdict.here + failed
                verdict = replace(verdict, outcome=Outcome.NOT_SHOWN, p=highest, here=here)
            waiting[claim].clear()
        corrected[claim] = verdict
        if not waiting[claim]:
            del waiting[claim]
    return list(corrected.values())


def _tests(verdict: Verdict) -> list[tuple[Outcome, float]]:
    """List the outcomes that a verdict is tested for, with their p-values, the weaker one first."""
    tests = [] if verdict.partly_p is None else [(Outcome.PARTLY, verdict.partly_p)]
    return tests if verdict.p is None else [*tests, (verdict.outcome, verdict.p)]


def weaker(first: Outcome, second: Outcome) -> Outcome:
    """Combine the outcomes of a claim that must hold twice, such as at two learning rates."""
    if first == second:
        return first
    order = (Outcome.SHOWN, Outcome.PARTLY, Outcome.NOT_SHOWN)
    if first in order and second in order:
        return max(first, second, key=order.index)
    return Outcome.NOT_MEASURED if Outcome.NOT_MEASURED in (first, second) else Outcome.NOT_SHOWN


def judge_below(interval: Interval, shown: float, partly: float) -> Outcome:
    """Judge an interval: shown if below `shown`, partly if below `partly`, contradicted if above `partly`."""
    if interval.high < shown:
        return Outcome.SHOWN
    if interval.high < partly:
        return Outcome.PARTLY
    return Outcome.CONTRADICTED if interval.low > partly else Outcome.NOT_SHOWN


def judge_above(interval: Interval, bound: float = 0.0) -> Outcome:
    """Judge an interval: shown if above a bound, contradicted if below."""
    if interval.low > bound:
        return Outcome.SHOWN
    return Outcome.CONTRADICTED if interval.high < bound else Outcome.NOT_SHOWN


def edge_text(arms: Iterable[ArmResults]) -> str:
    """Return a warning that names the arms whose best rate is at the edge of their sweep, or nothing."""
    sweeps = {arm.sweep.name: arm.sweep for arm in arms}
    names = [f"{name} ({rate_text(found.best)})" for name, found in sweeps.items() if found.is_at_edge]
    return f" Best rate at the edge of the sweep: {', '.join(names)}." if names else ""


def mean_text(values: Iterable[float | None]) -> str:
    """Format the mean with four digits."""
    return number(confidence_interval(values).mean)


def interval_text(interval: Interval) -> str:
    """Format mean and ends with three digits."""
    if not interval.is_known:
        return _short(interval.mean)
    return f"{_short(interval.mean)} [{_short(interval.low)}, {_short(interval.high)}]"


def difference_text(interval: Interval) -> str:
    """Format mean and ends with signs."""
    if not interval.is_known:
        return f"{interval.mean:+.3f}" if interval.mean == interval.mean else "not finite"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def rate_text(rate: float) -> str:
    """Format a learning rate as in the settings: 3e-3."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _short(value: float) -> str:
    return "not finite" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
