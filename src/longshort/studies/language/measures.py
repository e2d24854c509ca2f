"""Measures of trained language models: losses at equal cost, curves, and tables of arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from longshort.reporting.intervals import (
    Interval,
    log_prediction_interval,
    paired_difference,
    prediction_interval,
)
from longshort.reporting.page import Section, Table, number
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference,
    difference_text,
    interval_text,
    rate_text,
    ratio,
)
from longshort.studies.framework.sweep import Rate, Sweep
from longshort.studies.language.arms import LS, MHSA

QUANTITIES = ("validation_loss", "max_logit", "max_logit_in_band", "row_range")
"""The numbers of an arm that tables show, and that are predicted for another seed."""

_GOOD = 0.1  # nats above the lowest loss up to which a rate is good


def loss_difference(first: ArmResults, second: ArmResults, rate: Rate = "best") -> Interval:
    """Compute the paired difference of the validation loss at equal steps, nats per byte."""
    return difference(first, second, "validation_loss", rate)


def loss_difference_at_equal_flops(first: ArmResults, second: ArmResults) -> Interval:
    """Compute the paired difference of the validation loss when both had spent the cheaper one's total."""
    losses = []
    for arm, other in ((first, second), (second, first)):
        by_seed = {}
        for seed, result in arm.by_rate["best"].items():
            budget = min(spent(result, "flops"), spent(other.by_rate["best"][seed], "flops"))
            by_seed[seed] = loss_at_flops(result, budget)
        losses.append(by_seed)
    return paired_difference(*losses)


def spent(result: Mapping[str, Any], unit: str) -> float:
    """Compute the total that a run spent, in "tokens" or "flops"."""
    return result["validation_curve"][-1][0] * result[f"{unit}_per_step"]


def loss_at_flops(result: Mapping[str, Any], flops: float) -> float | None:
    """Interpolate the validation loss of a run when it had spent these FLOPs."""
    step = flops / result["flops_per_step"]
    curve = result["validation_curve"]
    before = curve[0]
    for after in curve:
        if after[0] >= step * (1 - 1e-9):
            if after[1] is None or before[1] is None:
                return None
            if after is before:
                return after[1]
            share = (step - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return curve[-1][1]


def curves(arm: ArmResults, name: str) -> list[list[tuple[float, float | None]]]:
    """Return a curve per seed: "loss_curve", "validation_curve" or one of the logit curves."""
    return [
        [
            tuple(point)
            for point in (result if name.endswith("_curve") else result["logit_curves"]).get(name, [])
        ]
        for result in arm.results()
    ]


def seconds_per_step(arm: ArmResults) -> float | None:
    """Compute the median seconds of a training step at the best rate; None if it was not measured."""
    seconds = [
        result["tokens_per_step"] / result["timing"]["tokens_per_second"]
        for result in arm.results()
        if result.get("timing", {}).get("tokens_per_second")
    ]
    return median(seconds) if seconds else None


def good_decades(sweep: Sweep) -> float:
    """Compute the width, in decades, of the range of tried rates within 0.1 nats of the best (Wortsman et al.
    2023 call its inverse learning-rate sensitivity)."""
    least = sweep.losses[sweep.best]
    if least is None:
        return 0.0
    good = [rate for rate, loss in sweep.losses.items() if loss is not None and loss <= least + _GOOD]
    return math.log10(max(good) / min(good))


def split_by_depth(arms: Arms) -> tuple[dict[str, ArmResults], dict[str, ArmResults]]:
    """Separate the arms of the setting's depth from those of another, which cannot be compared with them."""
    deep = {name: arm for name, arm in arms.items() if "num_hidden_layers" in arm.settings["model"]}
    return {name: arm for name, arm in arms.items() if name not in deep}, deep


def predict(quantity: str, values: Mapping[int, float | None]) -> Interval:
    """Predict another seed's value of a quantity: losses vary by differences, logits by factors."""
    rule = prediction_interval if quantity.endswith("loss") else log_prediction_interval
    return rule(values.values())


def predictions(arms: Arms) -> dict[str, dict[str, Interval]]:
    """Predict another seed's values, by arm, at its best rate."""
    return {
        name: {quantity: predict(quantity, arm.values(quantity)) for quantity in QUANTITIES}
        for name, arm in arms.items()
    }


def arm_table(arms: Arms) -> Table:
    """Make a table with a row per arm at its best rate: means over seeds, with the 95 % prediction interval
    for another seed."""
    rows = []
    for name, arm in arms.items():
        results = arm.results()
        rows.append(
            (
                name,
                f"{results[0]['parameters'] / 1000:,.0f}k",
                rate_text(arm.sweep.best) + (" (edge)" if arm.sweep.is_at_edge else ""),
                *(interval_text(predict(quantity, arm.values(quantity))) for quantity in QUANTITIES),
                f"{sum(result['diverged_at'] is not None for result in results)} of {len(results)}",
                f"{sum(result['spikes'] for result in results)}",
                number(spent(results[0], "flops") / 1e12),
            )
        )
    header = (
        "", "parameters", "rate", "validation loss", "largest logit", "in window", "row range", "diverged",
        "spikes", "TFLOPs",
    )  # fmt: skip
    return Table(header, rows)


def pair_sections(arms: Arms) -> list[Section]:
    """Make a section that compares each arm of LS-attention with its counterpart, "LS + RoPE" with "MHSA +
    RoPE"; none if no counterpart was measured."""
    rows = []
    for name, arm in arms.items():
        other = arms.get(f"{MHSA.name}{name.removeprefix(LS.name)}") if name.startswith(LS.name) else None
        if other is not None:
            ratios = (ratio(arm, other, quantity) for quantity in QUANTITIES if quantity != "validation_loss")
            losses = loss_difference(arm, other), loss_difference_at_equal_flops(arm, other)
            rows.append((name, *map(interval_text, ratios), *map(difference_text, losses)))
    header = ("", "largest logit", "in window", "row range", "loss at equal steps", "loss at equal FLOPs")
    text = (
        "Ratios of logits, LS / MHSA, and differences of validation losses, LS − MHSA, in nats per byte: "
        "means and 95 % confidence intervals over paired seeds, each arm at its best rate. At equal FLOPs "
        "both have spent the total of the cheaper one."
    )
    return [Section("LS-attention relative to MHSA", [text], table=Table(header, rows))] if rows else []


def sweep_section(arms: Arms) -> Section:
    """Make a section with a row per arm: the validation loss of the first seed at every rate of its sweep."""
    rates = sorted({rate for arm in arms.values() for rate in arm.sweep.losses})
    rows = []
    for name, arm in arms.items():
        cells = []
        for rate in rates:
            text = number(arm.sweep.losses[rate]) if rate in arm.sweep.losses else ""
            cells.append(f"{text} ←" if rate == arm.sweep.best else text)
        rows.append((name, *cells))
    table = Table(("validation loss by learning rate, first seed", *map(rate_text, rates)), rows)
    return Section("Learning rates", ["The best rate of each arm is marked."], table=table)
