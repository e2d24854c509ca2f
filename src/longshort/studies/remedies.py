"""Study `remedies` (figure 5 and beyond): perplexity, cost and good learning rates of LS-attention and of
other remedies for exploding logits. It is a control without verdicts; the study `progress` judges the
claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshort.data import prepare
from longshort.reporting.intervals import Interval, paired_log_ratio
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_points
from longshort.studies.framework.comparison import ArmResults, Arms, interval_text, measure_arms
from longshort.studies.framework.study import Findings, Plan, Results, Scale, Trial, Workplace, unique
from longshort.studies.framework.sweep import Arm, plan_arms
from longshort.studies.language.arms import (
    DEEP_LS,
    HYBRID,
    LS,
    MHSA,
    QK_NORM,
    Setting,
    Variant,
    paper_base,
    tiny,
)
from longshort.studies.language.equal_progress import cost_to_reach
from longshort.studies.language.measures import (
    arm_table,
    curves,
    good_decades,
    loss_difference,
    predictions,
    seconds_per_step,
    spent,
    split_by_depth,
    sweep_section,
)
from longshort.studies.language.trial import LanguageStudy

FP32 = Variant("MHSA, fp32", {"attention_precision": "fp32"}, {**MHSA.train, "precision": "fp32"})
VARIANTS = (
    LS,
    MHSA,
    FP32,
    QK_NORM,
    LS.with_model("LS + QK-norm", qk_norm=True),
    MHSA.with_train("MHSA + QK-clip", qk_clip=30.0),
    MHSA.with_model("MHSA + softcap", softcap=30.0),
    MHSA.with_train("MHSA + z-loss", z_loss=1e-4),
    MHSA.with_model("MHSA + sink logits", sink_logits=True),
)
"""The paper's four, of which LS and MHSA are in bf16, and further ones."""

PIECES = 10_000
PEAK_TFLOPS = {"bf16": 312.0, "fp32": 19.5}
"""Published dense peaks of an NVIDIA A100; fp32 outside the tensor cores."""


@dataclass(frozen=True)
class _Scale:
    setting: Setting
    seeds: int
    deep: Sequence[Variant] = ()

    @property
    def arms(self) -> list[Arm]:
        return self.setting.arms((*VARIANTS, *self.deep))


class Remedies(LanguageStudy):
    """A comparison of LS-attention and other remedies: perplexity, cost, sensitivity to the learning rate."""

    name = "remedies"
    title = "LS-attention against other remedies (figure 5)"
    claims = ()
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(tiny(64, batch=2, steps=12, rates=(1e-2,)), seeds=2),
        "overnight": _Scale(
            tiny(2048, batch=2, steps=3000, rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
            seeds=5,
            deep=(DEEP_LS, HYBRID),
        ),
        "paper": _Scale(paper_base(8192), seeds=3),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        plan = plan_arms(self.scales[scale].arms, seeds, results, ("best",))
        return Plan([_pieces_trial(), *unique(plan.trials)], plan.later_work)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        if trial.key != _pieces_trial().key:
            return super().run(trial, workplace)
        folder = workplace.folder / "pieces"
        made = prepare(workplace.source, folder, tokenizer="bpe", vocab_size=PIECES, overwrite=True)
        return {"bytes_per_piece": made.validation.bytes_per_token, "pieces": made.vocab_size}

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms(chosen.arms, seeds, results, ("best",))
        pieces = results.get(_pieces_trial().key)
        bytes_per_piece = pieces["bytes_per_piece"] if pieces else math.nan
        return Findings((), _sections(chosen, arms, bytes_per_piece, folder), predictions(arms))


def _pieces_trial() -> Trial:
    return Trial("bytes per piece", 0, {"pieces": PIECES}, work=20.0)


def _perplexity_ratio(first: ArmResults, second: ArmResults, bytes_per_piece: float) -> Interval:
    """Compute the ratio of perplexities per piece: a difference of losses per byte, times bytes per piece."""
    return loss_difference(first, second).times(bytes_per_piece).exp()


def _cost_ratio(first: ArmResults, second: ArmResults, unit: str) -> Interval:
    """Compute what the first spends to reach the second's final loss, relative to what the second spent."""
    budget, needed = {}, {}
    for seed, result in second.by_rate["best"].items():
        loss = result["validation_loss"]
        budget[seed] = spent(result, unit)
        needed[seed] = None if loss is None else cost_to_reach(first.by_rate["best"][seed], loss, unit)
    return paired_log_ratio(needed, budget).exp()


def _sections(chosen: _Scale, arms: Arms, bytes_per_piece: float, folder: Path) -> list[Section]:
    if LS.name not in arms:
        return []
    plain, deep = split_by_depth(arms)
    by_rate = {
        "Validation loss, first seed": {
            name: [
                (rate, Interval(math.nan if loss is None else loss, -math.inf, math.inf, 1))
                for rate, loss in sorted(arm.sweep.losses.items())
            ]
            for name, arm in plain.items()
        }
    }
    return [
        Section("Remedies side by side", [chosen.setting.description], table=arm_table(plain)),
        Section(
            "Perplexity and cost",
            [
                (f"Perplexities are per piece of a {PIECES:,}-piece tokenizer of the same corpus, "
                f"{bytes_per_piece:.2f} bytes each, so that they can stand beside the paper's. GPU hours are "
                "not measured: FLOPs over the published peaks of an A100 (bf16 312, fp32 19.5 TFLOP/s). "
                "Costs of LS to reach an arm's final loss are relative to what that arm spent; not reached: "
                "on some seed LS never came as low. "
                "Decades of good rates: the width of the range of learning rates within 0.1 nats of the "
                "best. Milliseconds: medians on this machine, other trials running beside; blank where times "
                "were not kept.")
            ],
            table=_cost_table(plain, bytes_per_piece),
            figures=[
                Figure(
                    draw_curves(_cost_panels(plain), folder / "remedies.png"), "Each arm at its best rate."
                ),
                Figure(
                    draw_points(
                        by_rate, folder / "rates.png", "learning rate", "nats per byte", log_y=False,
                        log_x_base=10,
                    ),
                    "Sensitivity to the learning rate: the loss at the end of a full run at each rate.",
                ),
            ],
        ),
        *([Section("The hybrid by layers, of four layers", table=arm_table(deep))] if deep else []),
        sweep_section(arms),
    ]  # fmt: skip


def _cost_table(arms: Arms, bytes_per_piece: float) -> Table:
    rows = []
    for name, arm in arms.items():
        relative = ["1"] * 4
        if name != LS.name:
            peak = PEAK_TFLOPS["fp32" if name == FP32.name else "bf16"]
            tokens, flops = (_cost_ratio(arms[LS.name], arm, unit) for unit in ("tokens", "flops"))
            costs = (tokens, flops, flops.times(peak / PEAK_TFLOPS["bf16"]))
            perplexity = _perplexity_ratio(arms[LS.name], arm, bytes_per_piece)
            relative = [interval_text(perplexity), *map(_cost_text, costs)]
        seconds = seconds_per_step(arm)
        milliseconds = "" if seconds is None else f"{1000 * seconds:.0f}"
        rows.append((name, *relative, f"{good_decades(arm.sweep):.1f}", milliseconds))
    header = (
        "", "perplexity, LS relative to it", "tokens for LS to reach it", "FLOPs for LS to reach it",
        "GPU hours, modelled", "decades of good rates", "ms a step",
    )  # fmt: skip
    return Table(header, rows)


def _cost_text(ratio: Interval) -> str:
    """Format a ratio of costs, which is unknown where LS did not reach the loss on every seed."""
    return interval_text(ratio) if ratio.mean == ratio.mean else "not reached"


def _cost_panels(arms: Arms) -> list[Panel]:
    """Make panels of loss by cost, by time if it was measured for all arms, and of largest logit by step."""

    def panel(title: str, x: str, per_step: Mapping[str, float]) -> Panel:
        lines = {
            name: [
                [(step * per_step[name], loss) for step, loss in curve]
                for curve in curves(arm, "validation_curve")
            ]
            for name, arm in arms.items()
        }
        return Panel(title, x, "validation loss (nats per byte)", lines)

    def cost(unit: str, factor: float) -> dict[str, float]:
        return {name: factor * arm.results()[0][f"{unit}_per_step"] for name, arm in arms.items()}

    panels = [
        panel("By tokens", "million tokens", cost("tokens", 1e-6)),
        panel("By FLOPs", "TFLOPs", cost("flops", 1e-12)),
    ]
    seconds = {name: seconds_per_step(arm) for name, arm in arms.items()}
    measured = {name: value for name, value in seconds.items() if value is not None}
    if len(measured) == len(arms):
        panels.append(panel("By time on this machine", "seconds of training, one core", measured))
    logits = {name: curves(arm, "max_logit") for name, arm in arms.items()}
    return [*panels, Panel("Largest logit", "step", "largest |scale · q·k|", logits)]
