"""Study `length` (figures 3 and 4): do logits grow with the sequence length in MHSA, and less in
LS-attention?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval, confidence_interval, log_or_none, slope_interval
from longshort.reporting.page import Figure, Section
from longshort.reporting.plots import Panel, draw_curves, draw_points
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference_text,
    interval_text,
    judge,
    judge_below,
    measure_arms,
    ratio,
)
from longshort.studies.framework.study import Claim, Findings, Outcome, Plan, Results, Scale, Verdict, unique
from longshort.studies.framework.sweep import Arm, Rate, plan_arms
from longshort.studies.language.arms import LS, LS_ROPE, MHSA, MHSA_ROPE, Setting, Variant, paper_base, tiny
from longshort.studies.language.measures import (
    arm_table,
    curves,
    diverged,
    loss_difference,
    loss_difference_at_equal_flops,
    predictions,
)
from longshort.studies.language.trial import LanguageStudy

TOKENS, SEQUENCES = "equal tokens a step", "equal sequences a step"
"""The budgets: with equal sequences every learned position is trained equally often at all lengths."""

GROWTH = Claim(
    "F3",
    "With MHSA instability and logit explosion appear at longer sequence lengths.",
    "MHSA's largest logit does not grow with the sequence length, or shrinks.",
    "The 95 % interval, over seeds, of the slope of log largest logit (last tenth of the training) over log "
    "n. Shown: above 0 at equal tokens a step and at equal sequences a step. Partly: above 0 in one of the "
    "two. Contradicted: below 0 in both. It must hold at the best rates and at the next lower ones.",
)
MITIGATION = Claim(
    "F4: each length",
    "LS-attention mitigates logit explosion and instability at each length.",
    "At some length LS's largest logit is as large as MHSA's, or LS diverges more often.",
    "95 % intervals of LS/MHSA of the largest logit, paired over seeds, at equal tokens a step. Shown: below "
    "1 at every length, and LS diverges at no length more often than MHSA. Partly: below 1 at more than half "
    "of the lengths. Contradicted: above 1 at more than half of them. It must hold at the best rates and at "
    "the next lower ones.",
)


@dataclass(frozen=True)
class _Scale:
    """The arms of one scale. Rates are swept at the length of `setting`, or at each with `own_sweeps`."""

    setting: Setting
    lengths: Sequence[int]
    seeds: int
    sequences: int
    own_sweeps: bool = False
    controls: Sequence[Variant] = ()

    @property
    def arms(self) -> list[Arm]:
        """Return MHSA in both budgets, and the other variants at equal tokens a step."""
        return [
            self._at_length(variant, budget, length)
            for variant in (MHSA, LS, *self.controls)
            for budget in ((TOKENS, SEQUENCES) if variant in (MHSA, MHSA_ROPE) else (TOKENS,))
            for length in self.lengths
        ]

    def _at_length(self, variant: Variant, budget: str, length: int) -> Arm:
        train: dict[str, Any] = dict(self.setting.train)
        tokens = train["batch_size"] * train["sequence_length"]
        validation_tokens = train["validation_windows"] * train["sequence_length"]
        train["sequence_length"] = length
        train["batch_size"] = tokens // length if budget == TOKENS else self.sequences
        train["validation_windows"] = max(1, validation_tokens // length)
        if "micro_batch_size" in train:
            train["micro_batch_size"] = min(train["batch_size"], max(1, 16_384 // length))
        arm = replace(self.setting, train=train).arm(variant)
        swept = None if self.own_sweeps else self.setting.arm(variant)
        return replace(arm, name=_name(variant, budget, length), swept=swept)


def _name(variant: Variant, budget: str, length: int) -> str:
    return f"{variant.name}, {budget}, n = {length}"


class Length(LanguageStudy):
    """A comparison of MHSA and LS-attention at growing sequence lengths, in two budgets."""

    name = "length"
    title = "Sequence length (figures 3 and 4)"
    claims = (GROWTH, MITIGATION)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(tiny(64, batch=2, steps=12, rates=(1e-2,)), (32, 64), seeds=2, sequences=1),
        "laptop": _Scale(tiny(512, batch=4, steps=2000), (256, 512, 1024), seeds=3, sequences=1),
        "overnight": _Scale(
            tiny(512, batch=8, steps=2500),
            (256, 512, 1024, 2048, 4096),
            seeds=5,
            sequences=1,
            own_sweeps=True,
            controls=(MHSA_ROPE, LS_ROPE),
        ),
        "paper": _Scale(paper_base(2048), (512, 1024, 2048, 4096, 8192), seeds=3, sequences=64),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        plan = plan_arms(self.scales[scale].arms, seeds, results)
        return Plan(unique(plan.trials), plan.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms(chosen.arms, seeds, results)
        verdicts = [_judge_growth(chosen, arms), _judge_mitigation(chosen, arms)]
        return Findings(verdicts, _sections(chosen, arms, folder), predictions(arms))


Series = Mapping[int, ArmResults]
"""The arms of a variant in a budget, by length."""


def _series(chosen: _Scale, arms: Arms, variant: Variant, budget: str) -> Series:
    names = {length: _name(variant, budget, length) for length in chosen.lengths}
    return {length: arms[name] for length, name in names.items() if name in arms}


def _slope(series: Series, quantity: str, rate: Rate) -> Interval:
    """Compute the slope of log value over log length, over seeds."""
    values = {math.log(length): arm.values(quantity, rate) for length, arm in series.items()}
    seeds = next(iter(values.values()))
    return slope_interval([[(x, log_or_none(row[seed])) for x, row in values.items()] for seed in seeds])


def _judge_growth(chosen: _Scale, arms: Arms) -> Verdict:
    budgets = (TOKENS, SEQUENCES)

    def slope(budget: str, rate: Rate = "best", variant: Variant = MHSA, name: str = "max_logit") -> Interval:
        return _slope(_series(chosen, arms, variant, budget), name, rate)

    def rule(rate: Rate) -> Outcome:
        both = [slope(budget, rate) for budget in budgets]
        above = [interval.low > 0 for interval in both]
        if all(interval.high < 0 for interval in both):
            return Outcome.CONTRADICTED
        return Outcome.SHOWN if all(above) else Outcome.PARTLY if any(above) else Outcome.NOT_SHOWN

    def evidence() -> str:
        texts = [
            f"{budget}: {difference_text(slope(budget))} at the best rate, "
            f"{difference_text(slope(budget, 'lower'))} at the next lower one"
            for budget in budgets
        ]
        in_band = [
            f"{difference_text(slope(budget, name='max_logit_in_band'))} ({budget})" for budget in budgets
        ]
        losses = [
            f"{length}: {arm.mean('validation_loss'):.2f}"
            for length, arm in _series(chosen, arms, MHSA, TOKENS).items()
        ]
        return (
            f"Slope of MHSA's log largest logit over log n, {'; '.join(texts)}. Inside the window alone, "
            f"over the same number of pairs per query, at the best rate: {'; '.join(in_band)}. LS, {TOKENS}: "
            f"{difference_text(slope(TOKENS, variant=LS))}. MHSA's validation loss by n, {TOKENS}: "
            f"{', '.join(losses)} nats per token."
        )

    return judge(GROWTH, arms, [arm.name for arm in chosen.arms], rule, evidence)


def _judge_mitigation(chosen: _Scale, arms: Arms) -> Verdict:
    ls, mhsa = (_series(chosen, arms, variant, TOKENS) for variant in (LS, MHSA))

    def rule(rate: Rate) -> Outcome:
        outcomes = [judge_below(ratio(ls[n], mhsa[n], "max_logit", rate), 1.0, 1.0) for n in ls]
        shown, contradicted = outcomes.count(Outcome.SHOWN), outcomes.count(Outcome.CONTRADICTED)
        if shown == len(ls) and all(diverged(ls[n], rate) <= diverged(mhsa[n], rate) for n in ls):
            return Outcome.SHOWN
        if 2 * shown > len(ls):
            return Outcome.PARTLY
        return Outcome.CONTRADICTED if 2 * contradicted > len(ls) else Outcome.NOT_SHOWN

    def evidence() -> str:
        ratios = [f"n = {n}: {interval_text(ratio(ls[n], mhsa[n], 'max_logit'))}" for n in ls]
        losses = [difference_text(loss_difference(ls[n], mhsa[n])) for n in ls]
        at_flops = [difference_text(loss_difference_at_equal_flops(ls[n], mhsa[n])) for n in ls]
        return (
            f"LS/MHSA of the largest logit at the best rates: {'; '.join(ratios)}. Validation loss, LS − "
            f"MHSA: {'; '.join(losses)} nats per token at equal steps, {'; '.join(at_flops)} at equal FLOPs."
        )

    return judge(MITIGATION, arms, [arm.name for arm in chosen.arms], rule, evidence)


def _sections(chosen: _Scale, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    series = {
        (variant.name, budget): _series(chosen, arms, variant, budget)
        for variant in (MHSA, LS, *chosen.controls)
        for budget in (TOKENS, SEQUENCES)
    }
    lines = {
        title: {
            f"{name}, {budget}": [
                (float(length), confidence_interval(arm.values(quantity).values()))
                for length, arm in row.items()
            ]
            for (name, budget), row in series.items()
            if row
        }
        for title, quantity in (("Largest logit", "max_logit"), ("Validation loss", "validation_loss"))
    }
    by_step = [
        Panel(
            f"{variant.name}, {TOKENS}", "step", "largest |scale · q·k|",
            {f"n = {n}": curves(arm, "max_logit") for n, arm in series[variant.name, TOKENS].items()},
        )
        for variant in (MHSA, LS)
    ]  # fmt: skip
    swept = "each length has its own sweep" if chosen.own_sweeps else (
        f"rates are swept at n = {chosen.setting.train['sequence_length']} and used at every length"
    )  # fmt: skip
    return [
        Section(
            "By sequence length",
            [f"{chosen.setting.description} Here n varies; {swept}."],
            table=arm_table(arms),
            figures=[
                Figure(
                    draw_points(
                        lines, folder / "length.png", "sequence length (tokens)",
                        ("largest |scale · q·k|", "nats per token"),
                    ),
                    "Left: the largest attention logit of the last tenth of the training. Right: validation "
                    "loss in nats per token. Means and 95 % confidence intervals over seeds, at the best "
                    "rates.",
                ),
                Figure(
                    draw_curves(by_step, folder / "length_curves.png"),
                    "Largest logit by step at each length; thick: mean over seeds.",
                ),
            ],
        )
    ]  # fmt: skip
