"""What LS-attention spends to reach the losses of other remedies (figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import draw_curves
from longshort.studies.framework.comparison import ArmResults, Arms, interval_text
from longshort.studies.framework.study import Claim, Outcome, Verdict
from longshort.studies.language.arms import LS, QK_NORM
from longshort.studies.language.equal_progress import (
    ALIKE,
    CORRECTED,
    at_two_losses,
    judge_at_losses,
    judge_ratio,
    log_cost_ratio_at_loss,
    losses_reached,
    p_of_ratio,
)
from longshort.studies.progress.arms import FP32
from longshort.studies.progress.figures import by_cost

FIXED_LOSSES = (2.0, 1.7, 1.3)
"""The losses of figure 5, nats per byte."""

BASELINES = (QK_NORM.name, FP32.name)

REMEDIES = Claim(
    "F5",
    "LS-attention reaches the losses of MHSA with QK-norm, and of MHSA in fp32, with fewer tokens and FLOPs.",
    "LS needs as many FLOPs as either, or more.",
    "95 % intervals, paired over seeds, of the tokens and of the FLOPs that LS needs to reach a validation "
    f"loss of {', '.join(map(str, FIXED_LOSSES))} nats per byte, relative to those of MHSA + QK-norm and of "
    "MHSA in fp32, at the constant rate. LS is cheaper than one of them at a loss if both upper ends are "
    f"below 1 and its FLOPs are not alike (within a factor of {ALIKE}), and not cheaper if its FLOPs are "
    "above 1 or alike. Shown: cheaper than both at two or more losses. Partly: than one. A single seed has "
    "no interval, so that a baseline of one seed makes the claim partly shown at best. Contradicted: at two "
    "or more losses not cheaper than any baseline of several seeds, and at no other loss cheaper than one. A "
    "loss that speaks against the claim makes it not shown. Open unless all runs reach two of the losses. "
    f"GPU hours, of which the paper speaks, are not measured. {CORRECTED}",
    paper="2/5 of the perplexity of one; as good as the other in 1/20 of its GPU hours",
)

_UNITS = (("tokens", "tokens"), ("flops", "FLOPs"))


def judge_remedies(arms: Arms) -> Verdict:
    """Judge `REMEDIES` by LS and both baselines, which may have fewer seeds than LS."""

    def log_cost(name: str, unit: str, loss: float) -> Interval:
        return log_cost_ratio_at_loss(arms[LS.name], arms[name], unit, loss)

    def outcome_against(name: str, loss: float) -> Outcome:
        tokens, flops = (log_cost(name, unit, loss).exp() for unit, _ in _UNITS)
        outcome = judge_ratio(flops, 1.0)
        return Outcome.NOT_SHOWN if outcome is Outcome.SHOWN and not tokens.high < 1 else outcome

    def judged(loss: float) -> list[str]:
        """The baselines of several seeds."""
        return [name for name in BASELINES if log_cost(name, "flops", loss).is_known]

    def outcome_at(loss: float) -> Outcome:
        outcomes = [outcome_against(name, loss) for name in judged(loss)]
        if Outcome.SHOWN in outcomes:
            if Outcome.CONTRADICTED in outcomes:
                return Outcome.NOT_SHOWN
            return Outcome.SHOWN if outcomes == [Outcome.SHOWN] * len(BASELINES) else Outcome.PARTLY
        is_against = outcomes and all(outcome is Outcome.CONTRADICTED for outcome in outcomes)
        return Outcome.CONTRADICTED if is_against else Outcome.NOT_SHOWN

    def p_at(loss: float, outcome: Outcome) -> float:
        if outcome is Outcome.CONTRADICTED:
            return max(p_of_ratio(log_cost(name, "flops", loss), outcome, 1.0) for name in judged(loss))
        cheaper = [max(log_cost(name, unit, loss).p_below(0.0) for unit, _ in _UNITS) for name in BASELINES]
        return max(cheaper) if outcome is Outcome.SHOWN else min(1.0, 2 * min(cheaper))

    def evidence(losses: Sequence[float]) -> str:
        texts = []
        for name in BASELINES:
            costs = [
                f"{words} {', '.join(f'{_cost_text(arms, name, unit, loss)} at {loss}' for loss in losses)}"
                for unit, words in _UNITS
            ]
            texts.append(f"LS/{name} to reach a loss, {_seeds_text(arms[name])}: {'; '.join(costs)}")
        return f"{'. '.join(texts)}."

    return judge_at_losses(
        REMEDIES, arms, (LS.name, *BASELINES), at_two_losses(outcome_at, p_at), evidence,
        here=lambda loss: " and ".join(
            f"{_cost_text(arms, QK_NORM.name, unit, loss)} of QK-norm's {words}" for unit, words in _UNITS
        ),
        losses=FIXED_LOSSES,
    )  # fmt: skip


def _cost_text(arms: Arms, name: str, unit: str, loss: float) -> str:
    return interval_text(log_cost_ratio_at_loss(arms[LS.name], arms[name], unit, loss).exp())


def _seeds_text(arm: ArmResults) -> str:
    count = len(arm.results())
    return f"{count} seed{'s' if count > 1 else ''}"


def remedy_sections(arms: Arms, folder: Path) -> list[Section]:
    """Draw the losses of LS and the baselines that are measured by cost, with the ratios of their costs."""
    baselines = [name for name in BASELINES if name in arms]
    if LS.name not in arms or not baselines:
        return []
    rows = []
    for name in baselines:
        shared = losses_reached([*arms[LS.name].results(), *arms[name].results()], FIXED_LOSSES)
        for unit, words in _UNITS:
            cells = [_cost_text(arms, name, unit, loss) if loss in shared else "–" for loss in FIXED_LOSSES]
            rows.append((f"LS/{name}, {words}, {_seeds_text(arms[name])}", *cells))
    panels = [
        by_cost(
            {name: arms[name] for name in (LS.name, *baselines)},
            f"Validation loss by {words}",
            "validation_curve",
            "nats per byte",
            unit,
        )
        for unit, words in _UNITS
    ]
    return [
        Section(
            "Other remedies (figure 5)",
            ["What LS spends to reach a loss, relative to MHSA with another remedy, in the setting above."],
            table=Table(("to a loss of", *map(str, FIXED_LOSSES)), rows),
            figures=[
                Figure(draw_curves(panels, folder / "remedies.png"), "A line per seed; thick: the mean.")
            ],
        )
    ]
