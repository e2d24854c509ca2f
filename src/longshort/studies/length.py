"""Study `length` (figures 3 and 4): largest logit and loss of MHSA and LS-attention by sequence length. It is
a control without verdicts; the study `progress` judges the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval, confidence_interval, log_slopes
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_points
from longshort.studies.framework.comparison import ArmResults, Arms, difference_text, measure_arms
from longshort.studies.framework.study import Findings, Plan, Results, Scale, unique
from longshort.studies.framework.sweep import Arm, plan_arms
from longshort.studies.language.arms import LS, LS_ROPE, MHSA, MHSA_ROPE, Setting, Variant, paper_base, tiny
from longshort.studies.language.measures import arm_table, curves, pair_sections, predictions
from longshort.studies.language.trial import LanguageStudy

TOKENS, SEQUENCES = "equal tokens a step", "equal sequences a step"
"""The budgets: with equal sequences every learned position is trained equally often at all lengths."""


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
        """Return MHSA and MHSA + RoPE in both budgets, and the other variants at equal tokens a step."""
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
    claims = ()
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(tiny(64, batch=2, steps=12, rates=(1e-2,)), (32, 64), seeds=2, sequences=1),
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
        plan = plan_arms(self.scales[scale].arms, seeds, results, ("best",))
        return Plan(unique(plan.trials), plan.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms(chosen.arms, seeds, results, ("best",))
        return Findings((), _sections(chosen, arms, folder), predictions(arms))


Series = Mapping[int, ArmResults]
"""The arms of a variant in a budget, by length."""


def _series(chosen: _Scale, arms: Arms, variant: Variant, budget: str) -> Series:
    names = {length: _name(variant, budget, length) for length in chosen.lengths}
    return {length: arms[name] for length, name in names.items() if name in arms}


def _slope(series: Series, quantity: str) -> Interval:
    """Compute the slope of log value over log length, over seeds."""
    return confidence_interval(log_slopes({n: arm.values(quantity) for n, arm in series.items()}).values())


def _slope_sections(series: Mapping[tuple[str, str], Series]) -> list[Section]:
    rows = [
        (
            f"{name}, {budget}",
            *(difference_text(_slope(row, at)) for at in ("max_logit", "max_logit_in_band")),
        )
        for (name, budget), row in series.items()
        if len(row) > 1
    ]
    text = (
        "Slopes of the logarithm of the largest logit over that of n: means and 95 % confidence intervals "
        "over seeds, at the best rates. Inside the window a query sees the same number of keys at every n."
    )
    table = Table(("", "all visible pairs", "in window"), rows)
    return [Section("Growth with the length", [text], table=table)] if rows else []


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
                        ("largest |scale · q·k|", "nats per byte"),
                    ),
                    "Left: the largest attention logit of the last tenth of the training. Right: validation "
                    "loss in nats per byte. Means and 95 % confidence intervals over seeds, at the best "
                    "rates.",
                ),
                Figure(
                    draw_curves(by_step, folder / "length_curves.png"),
                    "Largest logit by step at each length; thick: mean over seeds.",
                ),
            ],
        ),
        *_slope_sections(series),
        *pair_sections(arms),
    ]  # fmt: skip
