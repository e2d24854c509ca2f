"""Study `design` (beyond the paper): layouts side by side, and whether global heads do better spread over the
layers than gathered in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longshort.model import kv_bytes
from longshort.reporting.intervals import Interval, confidence_interval, slope
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import draw_intervals, draw_points
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference_text,
    edge_text,
    measure_arms,
    weaker,
)
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Verdict,
    not_measured,
    unique,
)
from longshort.studies.framework.sweep import RATES, Arm, plan_arms
from longshort.studies.language.arms import (
    LS,
    LS_LOCAL_ROPE,
    LS_ROPE,
    MHSA,
    MHSA_ROPE,
    PAPER_SMALL,
    Setting,
    Variant,
    model_config,
    tiny,
)
from longshort.studies.language.measures import (
    arm_table,
    curves,
    loss_difference,
    loss_difference_at_equal_flops,
    pair_sections,
    predictions,
    split_by_depth,
    sweep_section,
)
from longshort.studies.language.trial import LanguageStudy

TOLERANCE = 0.02
"""A layout whose loss is within this of the lowest, in nats per byte, may be recommended."""

_CACHE_LENGTH = 32_768

SPREAD = Claim(
    "design: spread",
    "The same number of global heads does better spread over every layer than gathered in one.",
    "Gathered in one layer they do as well or better.",
    "95 % intervals of the validation loss, gathered minus spread, paired over seeds, for each place. Shown: "
    "lower ends above 0 for all. Partly: for at least one, and below 0 for none. Contradicted: below 0 for "
    "all. Otherwise not shown. It must hold at the best rates and at the next lower ones.",
)


def _counts(*numbers: int) -> tuple[Variant, ...]:
    return tuple(
        LS.with_model(f"{count} global head" + ("s" if count != 1 else ""), num_global_heads=count)
        for count in numbers
    )


def _windows(*sizes: int) -> tuple[Variant, ...]:
    return tuple(LS.with_model(f"window {size}", local_window=size) for size in sizes)


MIXED = LS.with_model("windows 8, 16, 64", layouts=[[8, 16, 64, None]] * 2)
POSITIONS = (LS_ROPE, MHSA_ROPE, LS_LOCAL_ROPE)
BOTTOM = LS.with_model("2 global heads, bottom layer", num_global_heads=[2, 0])
TOP = LS.with_model("2 global heads, top layer", num_global_heads=[0, 2])
DEEP = LS.with_model("4 layers, 1 global head each", num_hidden_layers=4)
DEEP_GATHERED = tuple(
    DEEP.with_model(f"4 layers, 4 global heads, {place}", num_global_heads=heads)
    for place, heads in (
        ("bottom", [4, 0, 0, 0]),
        ("middle", [0, 2, 2, 0]),
        ("alternate", [0, 2, 0, 2]),
        ("top", [0, 0, 0, 4]),
    )
)
PAPER_GATHERED = tuple(
    LS.with_model(f"6 global heads, {place}", num_global_heads=heads)
    for place, heads in (
        ("bottom", [6, 0, 0, 0, 0, 0]),
        ("middle", [0, 0, 3, 3, 0, 0]),
        ("alternate", [0, 2, 0, 2, 0, 2]),
    )
)


@dataclass(frozen=True)
class _Scale:
    """The arms of one scale: `gathered` layouts are compared with `spread`; `others` affect no verdict."""

    setting: Setting
    seeds: int
    gathered: Sequence[Variant]
    others: Sequence[Variant]
    needle: Mapping[str, Any]
    spread: Variant = LS

    @property
    def deciding(self) -> list[Arm]:
        """The arms on which the verdict depends."""
        return self._arms((self.spread, *self.gathered))

    @property
    def arms(self) -> list[Arm]:
        return self._arms((LS, MHSA, self.spread, *self.gathered, *self.others))

    def _arms(self, variants: Sequence[Variant]) -> list[Arm]:
        measured = [replace(variant, measure={"needle": self.needle}) for variant in variants]
        return list({arm.name: arm for arm in self.setting.arms(measured)}.values())


class Design(LanguageStudy):
    """A comparison of layouts: loss, needle retrieval, largest logit and cost."""

    name = "design"
    title = "Choosing a layout (beyond the paper)"
    claims = (SPREAD,)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(
            tiny(128, batch=2, steps=12, rates=(1e-2,)), 2, (BOTTOM,), (*_counts(0), LS_LOCAL_ROPE),
            {"lengths": [128], "depths": [0.5], "samples": 2},
        ),
        "laptop": _Scale(
            tiny(512, batch=4, steps=2000), 3, (BOTTOM, TOP), (MIXED, LS_ROPE, MHSA_ROPE),
            {"lengths": [128, 512], "depths": [0.1, 0.5, 0.9], "samples": 64},
        ),
        "overnight": _Scale(
            tiny(1024, batch=2, steps=4000), 5, DEEP_GATHERED,
            (*_counts(0, 2), *_windows(8, 32, 64, 128, 256, 512), MIXED, *POSITIONS),
            {"lengths": [128, 512, 1024], "depths": [0.1, 0.3, 0.5, 0.7, 0.9], "samples": 128}, DEEP,
        ),
        "paper": _Scale(
            PAPER_SMALL, 3, PAPER_GATHERED,
            (*_counts(0, 2, 4), *_windows(16, 100, 256, 512), *POSITIONS),
            {"lengths": [512, 2048], "depths": [0.1, 0.5, 0.9], "samples": 128},
        ),
    }  # fmt: skip

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        deciding = plan_arms(chosen.deciding, seeds, results)
        others = plan_arms(chosen.arms, seeds, results, ("best",))
        trials = unique([*deciding.trials, *others.trials])
        return Plan(trials, deciding.later_work + others.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms(chosen.arms, seeds, results, ("best",))
        deciding = measure_arms(chosen.deciding, seeds, results)
        tested = chosen.setting.extent(len(seeds))
        return Findings(
            [_judge_spread(chosen, deciding)], _sections(chosen, arms, folder), predictions(arms), tested
        )


def _judge_spread(chosen: _Scale, arms: Arms) -> Verdict:
    reference, gathered = chosen.spread.name, [variant.name for variant in chosen.gathered]

    needed = [reference, *gathered]
    if any(name not in arms for name in needed):
        return not_measured(SPREAD)
    at_best, at_lower = (
        [loss_difference(arms[name], arms[reference], rate) for name in gathered] for rate in RATES
    )
    at_flops = [loss_difference_at_equal_flops(arms[name], arms[reference]) for name in gathered]
    texts = [
        f"{name}: {difference_text(best)} at the best rates, {difference_text(lower)} at the next lower "
        f"ones, {difference_text(equal)} at equal FLOPs"
        for name, best, lower, equal in zip(gathered, at_best, at_lower, at_flops, strict=True)
    ]
    evidence = f"Validation loss minus that of {reference}, nats per byte. {'; '.join(texts)}."
    here = (f"{name}: {difference_text(best)} nats" for name, best in zip(gathered, at_best, strict=True))
    return Verdict(
        SPREAD,
        weaker(_spread_outcome(at_best), _spread_outcome(at_lower)),
        evidence + edge_text(arms[name] for name in needed),
        here="; ".join(here),
    )


def _spread_outcome(intervals: Sequence[Interval]) -> Outcome:
    """Return the outcome by the differences between the losses of the gathered layouts and the spread one."""
    above = [interval.low > 0 for interval in intervals]
    if all(above):
        return Outcome.SHOWN
    if all(interval.high < 0 for interval in intervals):
        return Outcome.CONTRADICTED
    is_mixed = any(interval.high < 0 for interval in intervals)
    return Outcome.PARTLY if any(above) and not is_mixed else Outcome.NOT_SHOWN


def _recommend(arms: Arms) -> str:
    """Name the layout of the smallest cache whose mean loss is within `TOLERANCE` of the lowest."""
    losses = {name: arm.mean("validation_loss") for name, arm in arms.items()}
    known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not known:
        return "No layout trained."
    best = min(known, key=known.__getitem__)
    near = [name for name, loss in known.items() if loss <= known[best] + TOLERANCE]
    cheapest = min(near, key=lambda name: _cache_share(arms[name]))
    return (
        f"The lowest loss has {best} ({known[best]:.3f} nats per byte). Of the layouts within {TOLERANCE} "
        f"of it ({', '.join(near)}), {cheapest} keeps the fewest keys: {_cache_share(arms[cheapest]):.0%} "
        f"of MHSA's at {_CACHE_LENGTH:,} tokens."
    )


def _describe_late(arms: Arms) -> str:
    """Describe which layouts, including LS, are still catching up at the end."""
    slopes = {name: _late_slope(arm) for name, arm in arms.items()}
    known = {name: value for name, value in slopes.items() if value is not None}
    if LS.name not in known or MHSA.name not in known:
        return ""
    steepest = min(known, key=known.__getitem__)
    text = (
        "Over the second half of the training, per doubling of the steps, the loss of LS changes by "
        f"{known[LS.name]:+.3f} and MHSA's by {known[MHSA.name]:+.3f} nats per byte; {steepest} falls "
        f"fastest ({known[steepest]:+.3f}). "
    )
    if known[LS.name] <= known[MHSA.name]:
        return text + "LS does not fall behind here."
    keeping_up = [name for name, value in known.items() if value <= known[MHSA.name] and name != MHSA.name]
    if not keeping_up:
        return text + "MHSA is catching up with every other layout."
    return text + f"MHSA is catching up with LS, but not with {', '.join(keeping_up)}."


def _sections(chosen: _Scale, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    plain, deep = split_by_depth(arms)
    others = {name: arm for name, arm in plain.items() if LS.name in plain and name != LS.name}
    differences = {name: loss_difference(arm, plain[LS.name]) for name, arm in others.items()}
    at_flops = {name: loss_difference_at_equal_flops(arm, plain[LS.name]) for name, arm in others.items()}
    lengths = chosen.needle["lengths"]
    rows = [
        (
            name,
            *(difference_text(row[name]) if name in row else "" for row in (differences, at_flops)),
            number(_late_slope(arm)),
            *(number(_mean(_needle_gains(arm, length))) for length in lengths),
            f"{_cache_share(arm):.1%}",
        )
        for name, arm in plain.items()
    ]
    header = (
        "layout", "loss − LS's", "at equal FLOPs", "late slope",
        *(f"needle at {length:,}" for length in lengths), "cache at 32k",
    )  # fmt: skip
    needles = {
        f"{length:,} tokens": {
            name: [
                (depth, confidence_interval(_needle_gains(arm, length, depth)))
                for depth in chosen.needle["depths"]
            ]
            for name, arm in plain.items()
        }
        for length in lengths
    }
    figures = [
        Figure(
            draw_points(
                needles, folder / "needle.png", "depth of the needle (0: beginning)", "nats per token gained",
                log_y=False, log_x_base=0,
            ),
            "Nats per token gained by the needle, by its depth.",
        )
    ]  # fmt: skip
    if differences:
        file = draw_intervals(
            list(differences.items()), folder / "design.png", "Validation loss relative to LS",
            "nats per byte", references={0.0: "LS"},
        )  # fmt: skip
        figures.insert(0, Figure(file, "Paired differences over seeds, means and 95 % intervals."))
    return [
        Section(
            "Layouts side by side",
            [chosen.setting.description, _recommend(plain), _describe_late(plain)],
            table=arm_table(plain),
        ),
        Section(
            "What they can do, and what they cost",
            [
                (
                    "Late slope: change of the validation loss per doubling of the steps, over the second "
                    "half of the training; where it is more negative, the layout is still catching up. "
                    "Needle: how much more likely, in nats per token, a random string becomes when it stood "
                    "earlier in the text; models are not trained on that task. Cache: keys and values kept "
                    "at 32,768 tokens, relative to MHSA."
                )
            ],
            table=Table(header, rows),
            figures=figures,
        ),
        *([Section("Layouts of four layers", table=arm_table(deep))] if deep else []),
        *pair_sections(arms),
        sweep_section(arms),
    ]


def _needle_gains(arm: ArmResults, length: int, depth: float | None = None) -> list[float | None]:
    """Return the needle's gain at a length by seed; the mean over depths if no depth is given."""
    return [
        _mean(
            cell["gain"]
            for cell in result["needle"]
            if cell["length"] == length and depth in (None, cell["depth"])
        )
        for result in arm.results()
    ]


def _late_slope(arm: ArmResults) -> float | None:
    return _mean(
        slope([(math.log2(step), loss) for step, loss in curve if step >= curve[-1][0] / 2])
        for curve in curves(arm, "validation_curve")
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Compute the mean; None if a value is missing."""
    known = list(values)
    return None if None in known else fmean(value for value in known if value is not None)


def _cache_share(arm: ArmResults) -> float:
    """Compute the bytes of the cache at `_CACHE_LENGTH` tokens relative to MHSA's."""
    model, training = arm.settings["model"], arm.settings["train"]
    plain = {name: value for name, value in model.items() if name not in ("num_global_heads", "layouts")}
    configs = model_config(model, training), model_config(plain, {**training, "mhsa": True})
    ours, full = (kv_bytes(config, _CACHE_LENGTH, torch.bfloat16) for config in configs)
    return ours / full
