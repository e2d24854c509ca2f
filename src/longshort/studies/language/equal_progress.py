"""Comparison of language models at equal progress: where their validation losses first are equally low.

Logits grow while a model learns, and models learn at different speeds. So numbers of a run are read off where
its validation loss first falls to a fixed value, at the constant learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from longshort.reporting.intervals import (
    Interval,
    confidence_interval,
    log_slopes,
    paired_log_ratio,
)
from longshort.studies.framework.comparison import ArmResults, Arms, interval_text, judge_below
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured

LOSSES = (2.2, 2.1, 2.0, 1.7, 1.3)
"""Validation losses, nats per byte, at which runs are compared."""

BEGUN = 2.3
"""A model whose validation loss stays above this has not begun to learn from context."""

LEAST_LOSSES = 2
"""A verdict needs this many of `LOSSES`."""

ALIKE = 1.1
"""Ratios that are shown to lie within this factor of 1 are called alike, also those that are surely below 1:
so small a difference is none."""

CORRECTED = (
    "Whatever is said for or against the claim must also pass a test that it is so at two of the losses "
    "(Bonferroni's bound on a partial conjunction) and Holm's correction over the study's claims, p < 0.05."
)
"""The part that all rules at several losses share."""

LOSSES_TEXT = f"{', '.join(map(str, LOSSES[:-1]))} and {LOSSES[-1]}"

Result = Mapping[str, Any]


def step_at(result: Result, loss: float) -> float | None:
    """Interpolate the step at which the validation loss first is as low, before the rate decays; None if
    it never is."""
    before: tuple[float, float] | None = None
    for step, value in result["validation_curve"]:
        if step > result.get("constant_until", math.inf):
            return None
        if value is None:
            before = None
        elif value <= loss:
            if before is None:
                return step
            return before[0] + (before[1] - loss) / (before[1] - value) * (step - before[0])
        else:
            before = (step, value)
    return None


def cost_to_reach(result: Result, loss: float, unit: str) -> float | None:
    """Compute what a run had spent, in "tokens" or "flops", when its validation loss first was as low, before
    the rate decays; None if it never is."""
    step = step_at(result, loss)
    return None if step is None else step * result[f"{unit}_per_step"]


def at_loss(result: Result, quantity: str, loss: float) -> float | None:
    """Read off a quantity of the probe where the validation loss first is as low; None if it never is.

    Args:
        result: a result of `train_language_model`.
        quantity: a key of its probe.
        loss: nats per byte.
    """
    step = step_at(result, loss)
    return None if step is None else at_step(result, quantity, step)


def at_step(result: Result, quantity: str, step: float) -> float | None:
    """Interpolate a quantity of the probe at a step, geometrically; None if it is not known there."""
    before: tuple[float, float] | None = None
    for at, value in curve_of(result, quantity):
        if value is None or value <= 0:
            return None
        if at >= step:
            if before is None or at == step:
                return value
            share = (step - before[0]) / (at - before[0])
            return before[1] ** (1 - share) * value**share
        before = (at, value)
    return None


def curve_of(result: Result, name: str) -> list[tuple[int, float | None]]:
    """Return the points (step, value) of a curve: "validation_curve", "copying_curve", or a quantity of the
    probe."""
    if name.endswith("_curve"):
        return [(step, value) for step, value in result[name]]
    return list(zip(result["probe"]["step"], result["probe"][name], strict=True))


def is_stuck(result: Result) -> bool:
    """Return whether a run neither diverged nor began to learn: its validation loss never fell to `BEGUN` at
    the constant rate."""
    return result["diverged_at"] is None and step_at(result, BEGUN) is None


def losses_reached(results: Iterable[Result], losses: Sequence[float] = LOSSES) -> list[float]:
    """Return the losses that all of the results reach.

    A loss that a run was below at its first evaluation is left out: when it was crossed is not known.
    """
    results = list(results)
    return [loss for loss in losses if all(_falls_to(result, loss) for result in results)]


def _falls_to(result: Result, loss: float) -> bool:
    if step_at(result, loss) is None:
        return False
    _, first = result["validation_curve"][0]
    return first is not None and first > loss


def values_at_loss(arm: ArmResults, quantity: str, loss: float) -> dict[int, float | None]:
    """Read off a quantity of the probe where the validation loss first is as low, by seed."""
    return {seed: at_loss(result, quantity, loss) for seed, result in arm.by_rate["best"].items()}


def log_ratio_at_loss(first: ArmResults, second: ArmResults, quantity: str, loss: float) -> Interval:
    """Compute the paired log-ratio of a quantity of the probe of two arms at equal loss."""
    return paired_log_ratio(*(values_at_loss(arm, quantity, loss) for arm in (first, second)))


def log_ratio_at_cost(first: ArmResults, second: ArmResults, quantity: str, unit: str) -> Interval:
    """Compute the paired log-ratio of a quantity of the probe of two arms at equal steps ("step") or FLOPs
    ("flops"), as many as the cheaper arm spends at the constant rate."""

    def per_step(result: Result) -> float:
        return 1 if unit == "step" else result["flops_per_step"]

    spent = min(
        result["constant_until"] * per_step(result) for arm in (first, second) for result in arm.results()
    )
    sides = [
        {
            seed: at_step(result, quantity, spent / per_step(result))
            for seed, result in arm.by_rate["best"].items()
        }
        for arm in (first, second)
    ]
    return paired_log_ratio(*sides)


def log_cost_ratio_at_loss(first: ArmResults, second: ArmResults, unit: str, loss: float) -> Interval:
    """Compute the paired log-ratio of the "tokens" or "flops" that two arms spend to reach a loss."""
    sides = (
        {seed: cost_to_reach(result, loss, unit) for seed, result in arm.by_rate["best"].items()}
        for arm in (first, second)
    )
    return paired_log_ratio(*sides)


Decision = Callable[[Sequence[float]], tuple[Outcome, float, float | None]]
"""Returns an outcome, its p-value and its `Verdict.partly_p` from the losses that were reached."""

ONE_SEED = "One seed has no interval."


def at_two_losses(
    outcome_at: Callable[[float], Outcome], p_at: Callable[[float, Outcome], float]
) -> Decision:
    """Make the decision on a claim that must hold at `LEAST_LOSSES` losses.

    Args:
        outcome_at: returns the outcome at one loss.
        p_at: returns the p-value with which one loss speaks for an outcome.
    """

    def decide(losses: Sequence[float]) -> tuple[Outcome, float, float | None]:
        def p_of(outcome: Outcome) -> float:
            return p_of_two([p_at(loss, outcome) for loss in losses])

        outcome = combined([outcome_at(loss) for loss in losses])
        p = p_of(outcome) if outcome.is_claim else 1.0
        return outcome, p, p_of_partly(p, p_of(Outcome.PARTLY)) if outcome is Outcome.SHOWN else None

    return decide


def p_of_partly(p: float, partly_p: float) -> float | None:
    """Choose the `Verdict.partly_p` of a claim that is shown with p-value `p`: the one with which it is at
    least partly shown if that is smaller, else None."""
    return partly_p if partly_p < p else None


def judge_at_losses(
    claim: Claim,
    arms: Arms,
    needed: Sequence[str],
    decide: Decision,
    evidence: Callable[[Sequence[float]], str],
    here: Callable[[float], str],
    losses: Sequence[float] = LOSSES,
) -> Verdict:
    """Judge a claim at the losses that all runs of the needed arms reach.

    The claim is open while a run has not begun to learn, or if fewer than `LEAST_LOSSES` are reached, and not
    measured if no arm has two seeds.

    Args:
        claim: the claim.
        arms: arms whose trials are done.
        needed: names of the arms without which the claim is not judged.
        decide: returns the outcome and its p-value, from the losses that were reached.
        evidence: returns the numbers in words, from the losses that were reached.
        here: returns the number at one loss that says most.
        losses: the losses, nats per byte.
    """
    if any(name not in arms for name in needed):
        return not_measured(claim)
    results = {name: arms[name].results() for name in needed}
    late = [name for name, runs in results.items() if None in (step_at(run, BEGUN) for run in runs)]
    reached = losses_reached((result for runs in results.values() for result in runs), losses)
    if late or len(reached) < LEAST_LOSSES:
        reason = f"{', '.join(late)} did not fall to {BEGUN} nats per byte on every seed" if late else (
            f"Losses that all runs reach: {', '.join(map(str, reached)) or 'none'}"
        )  # fmt: skip
        return Verdict(claim, Outcome.NOT_REACHED, f"{reason}; too little progress to compare.")
    if all(len(runs) < 2 for runs in results.values()):
        return not_measured(claim, ONE_SEED)
    outcome, p, partly_p = decide(reached)
    return Verdict(claim, outcome, evidence(reached), p, here=at_ends(here, reached), partly_p=partly_p)


def at_ends(text: Callable[[float], str], losses: Sequence[float]) -> str:
    """Format a number at the first and at the last of the losses: "0.2 at a loss of 2.2, 0.6 at 1.3"."""
    return at_each(text, list(dict.fromkeys((losses[0], losses[-1]))))


def at_each(text: Callable[[float], str], losses: Sequence[float]) -> str:
    """Format a number at each of the losses: "0.2 at a loss of 2.2, 0.3 at 2.1, 0.6 at 2.0"."""
    first, *others = losses
    return ", ".join([f"{text(first)} at a loss of {first}", *(f"{text(loss)} at {loss}" for loss in others)])


def p_of_two(p_values: Sequence[float]) -> float:
    """Combine p-values at several losses into that of a claim that must hold at `LEAST_LOSSES` of them: the
    second smallest, by Bonferroni's bound on a partial conjunction (Benjamini and Heller, 2008)."""
    return min(1.0, (len(p_values) - LEAST_LOSSES + 1) * sorted(p_values)[LEAST_LOSSES - 1])


def combined(outcomes: Sequence[Outcome]) -> Outcome:
    """Combine the outcomes at several losses: shown, or partly, needs `LEAST_LOSSES` of them and none
    against."""
    against = outcomes.count(Outcome.CONTRADICTED)
    shown = outcomes.count(Outcome.SHOWN)
    partly = shown + outcomes.count(Outcome.PARTLY)
    if against:
        alone = against >= LEAST_LOSSES and not partly
        return Outcome.CONTRADICTED if alone else Outcome.NOT_SHOWN
    if shown >= LEAST_LOSSES:
        return Outcome.SHOWN
    return Outcome.PARTLY if partly >= LEAST_LOSSES else Outcome.NOT_SHOWN


def ratios_text(first: ArmResults, second: ArmResults, quantity: str, losses: Sequence[float]) -> str:
    """Format the ratios at equal losses: "0.5 [0.4, 0.6] at 2.0"."""
    ratios = {loss: log_ratio_at_loss(first, second, quantity, loss).exp() for loss in losses}
    return ", ".join(f"{interval_text(interval)} at {loss}" for loss, interval in ratios.items())


def is_alike(interval: Interval) -> bool:
    """Return whether a ratio is shown to be alike: its interval lies within a factor `ALIKE` of 1."""
    return interval.is_known and interval.low > 1 / ALIKE and interval.high < ALIKE


def sign_test(first: int, second: int) -> float:
    """Compute the exact two-sided p-value of a paired sign test.

    Args:
        first, second: pairs in which something happened on this side alone.
    """
    pairs, fewer = first + second, min(first, second)
    tail = sum(math.comb(pairs, count) for count in range(fewer + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def slopes_at_loss(by_size: Mapping[int, ArmResults], quantity: str, loss: float) -> dict[int, float | None]:
    """Compute the slope of log quantity over log size, such as the length, at equal loss, by seed; None where
    a value is missing."""
    return log_slopes({size: values_at_loss(arm, quantity, loss) for size, arm in by_size.items()})


def slope_at_loss(by_size: Mapping[int, ArmResults], quantity: str, loss: float) -> Interval:
    """Compute the interval over seeds of `slopes_at_loss`."""
    return confidence_interval(slopes_at_loss(by_size, quantity, loss).values())


def judge_ratio(interval: Interval, shown: float) -> Outcome:
    """Judge a ratio at one loss that is claimed to be below `shown`, at most 1. One that is alike counts as
    alike, also if its interval is below 1."""
    if is_alike(interval):
        return Outcome.CONTRADICTED
    return judge_below(interval, shown, 1.0)


def p_of_ratio(log_ratio: Interval, outcome: Outcome, shown: float) -> float:
    """Compute the p-value with which a ratio speaks for an outcome of `judge_ratio`: below `shown`, below 1,
    or, against the claim, above 1 or between the bounds of likeness."""
    if outcome is Outcome.CONTRADICTED:
        alike = max(log_ratio.p_below(math.log(ALIKE)), log_ratio.p_above(-math.log(ALIKE)))
        return min(alike, log_ratio.p_above(0.0))
    return log_ratio.p_below(math.log(shown) if outcome is Outcome.SHOWN else 0.0)
