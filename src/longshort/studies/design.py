"""Study `design` (beyond the paper): how many global heads, which windows, in which layers?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longshort.model import kv_bytes
from longshort.reporting.intervals import Interval, confidence_interval, slope
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import draw_intervals, draw_points
from longshort.studies.comparison import (
    RATES,
    Trained,
    arm_table,
    difference_text,
    edge_text,
    loss_difference,
    loss_difference_at_equal_flops,
    plan_arms,
    predictions,
    split_by_depth,
    sweep_table,
    trained_arms,
    without_doubles,
)
from longshort.studies.language import Arm, Setting, model_config
from longshort.studies.language_run import LanguageStudy
from longshort.studies.settings import LS, LS_ROPE, MHSA, MHSA_ROPE, PAPER_SMALL, tiny, with_model
from longshort.studies.study import Claim, Findings, Outcome, Plan, Results, Scale, Verdict, weaker

TOLERANCE = 0.02
"""Nats per token: losses nearer than this are called alike."""

_CACHE_LENGTH = 32_768

ENOUGH = Claim(
    "design: one global head",
    "One global head per layer is enough: more of them do not lower the loss.",
    f"With all heads global the loss is lower by more than {TOLERANCE} nats per token.",
    "The 95 % interval of the validation loss, all heads global minus one global head, paired over seeds, "
    f"each at its own rate. Shown: lower end above −{TOLERANCE}. Contradicted: upper end below −{TOLERANCE}. "
    "Otherwise not shown. It must hold at the best rates and at the next lower ones.",
)
NEEDED = Claim(
    "design: a global head",
    "A global head is needed: with local heads alone the loss is higher.",
    "Without global heads the loss is as low.",
    "The 95 % interval of the validation loss, no global head minus one, paired over seeds. Shown: lower end "
    "above 0. Contradicted: upper end below 0. Otherwise not shown. It must hold at the best rates and at "
    "the next lower ones.",
)
SPREAD = Claim(
    "design: spread",
    "The same number of global heads does better spread over every layer than gathered in one.",
    "Gathered in one layer they do as well or better.",
    "95 % intervals of the validation loss, gathered minus spread, paired over seeds, for each place. Shown: "
    "lower ends above 0 for all. Partly: for at least one, and below 0 for none. Contradicted: below 0 for "
    "all. Otherwise not shown. It must hold at the best rates and at the next lower ones.",
)


@dataclass(frozen=True)
class _Scale:
    """`spread` is the arm that the `gathered` ones are compared with."""

    setting: Setting
    seeds: int
    counts: Sequence[Arm]
    windows: Sequence[Arm]
    gathered: Sequence[Arm]
    positions: Sequence[Arm]
    spread: Arm
    needle: Mapping[str, Any]


def _counts(*numbers: int) -> tuple[Arm, ...]:
    return tuple(
        with_model(LS, f"{count} global head" + ("s" if count != 1 else ""), num_global_heads=count)
        for count in numbers
    )


def _windows(*sizes: int) -> tuple[Arm, ...]:
    return tuple(with_model(LS, f"window {size}", local_window=size) for size in sizes)


MIXED = with_model(LS, "windows 8, 16, 64", layouts=[[8, 16, 64, None]] * 2)
NO_POSITIONS = with_model(
    LS, "LS + RoPE, none on global heads", position_embedding="rope", global_position_embedding="none"
)
BOTTOM = with_model(LS, "2 global heads, bottom layer", num_global_heads=[2, 0])
TOP = with_model(LS, "2 global heads, top layer", num_global_heads=[0, 2])

DEEP = with_model(LS, "4 layers, 1 global head each", num_hidden_layers=4)
DEEP_GATHERED = tuple(
    with_model(LS, f"4 layers, 4 global heads, {place}", num_hidden_layers=4, num_global_heads=heads)
    for place, heads in (
        ("bottom", [4, 0, 0, 0]),
        ("middle", [0, 2, 2, 0]),
        ("alternate", [0, 2, 0, 2]),
        ("top", [0, 0, 0, 4]),
    )
)

_NEEDLE = {"lengths": [128, 512], "depths": [0.1, 0.5, 0.9], "samples": 64}
_SCALES: Mapping[Scale, _Scale] = {
    "smoke": _Scale(
        replace(tiny(128, batch=2, steps=12), rates=(1e-2,)), 2, _counts(0), (), (BOTTOM,), (NO_POSITIONS,),
        LS, {"lengths": [128], "depths": [0.5], "samples": 2},
    ),
    "laptop": _Scale(
        tiny(512, batch=4, steps=2000), 3, _counts(0, 2), (*_windows(64, 256), MIXED), (BOTTOM, TOP),
        (LS_ROPE, MHSA_ROPE, NO_POSITIONS), LS, _NEEDLE,
    ),
    "overnight": _Scale(
        tiny(1024, batch=2, steps=4000), 5, _counts(0, 2), (*_windows(8, 32, 64, 128, 256, 512), MIXED),
        DEEP_GATHERED, (LS_ROPE, MHSA_ROPE, NO_POSITIONS), DEEP,
        {"lengths": [128, 512, 1024], "depths": [0.1, 0.3, 0.5, 0.7, 0.9], "samples": 128},
    ),
    "paper": _Scale(
        PAPER_SMALL, 3, _counts(0, 2, 4), _windows(16, 100, 256, 512),
        tuple(
            with_model(LS, f"6 global heads, {place}", num_global_heads=heads)
            for place, heads in (
                ("bottom", [6, 0, 0, 0, 0, 0]),
                ("middle", [0, 0, 3, 3, 0, 0]),
                ("alternate", [0, 2, 0, 2, 0, 2]),
            )
        ),
        (LS_ROPE, MHSA_ROPE, NO_POSITIONS), LS,
        {"lengths": [512, 2048], "depths": [0.1, 0.5, 0.9], "samples": 128},
    ),
}  # fmt: skip


class Design(LanguageStudy):
    """Layouts against each other: loss, needle retrieval, largest logit and cost."""

    name = "design"
    title = "Choosing a layout (beyond the paper)"
    claims = (ENOUGH, NEEDED, SPREAD)

    def default_seeds(self, scale: Scale) -> int:
        return _SCALES[scale].seeds

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = _SCALES[scale]
        deciding = plan_arms(chosen.setting, _deciding(chosen), seeds, results)
        others = plan_arms(chosen.setting, _arms(chosen), seeds, results, at_lower=False)
        trials = without_doubles([*deciding.trials, *others.trials])
        return Plan(trials, deciding.later_work + others.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = _SCALES[scale]
        found = trained_arms(chosen.setting, _arms(chosen), seeds, results, at_lower=False)
        deciding = trained_arms(chosen.setting, _deciding(chosen), seeds, results)
        gathered = [arm.name for arm in chosen.gathered]
        verdicts = [
            _judge(ENOUGH, deciding, LS.name, [MHSA.name], _below_tolerance),
            _judge(NEEDED, deciding, LS.name, [_counts(0)[0].name], _sign),
            _judge(SPREAD, deciding, chosen.spread.name, gathered, _sign),
        ]
        return Findings(verdicts, _sections(chosen, found, folder), predictions(found))


def _deciding(chosen: _Scale) -> list[Arm]:
    """The arms that verdicts rest on."""
    return _measured(chosen, (LS, MHSA, chosen.spread, *_counts(0), *chosen.gathered))


def _arms(chosen: _Scale) -> list[Arm]:
    return [
        *_deciding(chosen),
        *_measured(chosen, (*chosen.counts, *chosen.windows, *chosen.positions)),
    ]


def _measured(chosen: _Scale, arms: Sequence[Arm]) -> list[Arm]:
    by_name = {arm.name: replace(arm, measure={"needle": chosen.needle}) for arm in arms}
    return list(by_name.values())


def _judge(
    claim: Claim,
    found: Mapping[str, Trained],
    reference: str,
    names: Sequence[str],
    rule: Callable[[Sequence[Interval]], Outcome],
) -> Verdict:
    """Losses of some layouts minus that of a reference, judged at the best rates and at the next lower
    ones."""
    if any(name not in found for name in (reference, *names)):
        return Verdict(claim, Outcome.NOT_MEASURED, "The trials are not done.")
    by_rate = {
        rate: [loss_difference(found[name], found[reference], rate) for name in names] for rate in RATES
    }
    at_flops = [loss_difference_at_equal_flops(found[name], found[reference]) for name in names]
    texts = [
        f"{name}: {difference_text(best)} at the best rates, {difference_text(lower)} at the next lower "
        f"ones, {difference_text(equal)} at equal FLOPs"
        for name, best, lower, equal in zip(names, by_rate["best"], by_rate["lower"], at_flops, strict=True)
    ]
    edges = edge_text(found[name] for name in (reference, *names))
    evidence = f"Validation loss minus that of {reference}, nats per token. {'; '.join(texts)}.{edges}"
    return Verdict(claim, weaker(*map(rule, by_rate.values())), evidence)


def _below_tolerance(intervals: Sequence[Interval]) -> Outcome:
    """Of all global heads minus one per layer."""
    (interval,) = intervals
    if interval.low > -TOLERANCE:
        return Outcome.SHOWN
    return Outcome.CONTRADICTED if interval.high < -TOLERANCE else Outcome.NOT_SHOWN


def _sign(intervals: Sequence[Interval]) -> Outcome:
    above = [interval.low > 0 for interval in intervals]
    if all(above):
        return Outcome.SHOWN
    if all(interval.high < 0 for interval in intervals):
        return Outcome.CONTRADICTED
    is_mixed = any(interval.high < 0 for interval in intervals)
    return Outcome.PARTLY if any(above) and not is_mixed else Outcome.NOT_SHOWN


def recommend(found: Mapping[str, Trained]) -> str:
    """Of the layouts whose mean loss is within `TOLERANCE` of the lowest, the one with the smallest cache."""
    losses = {name: _mean(arm.values("validation_loss")) for name, arm in found.items()}
    known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not known:
        return "No layout trained."
    best = min(known, key=known.__getitem__)
    near = [name for name, loss in known.items() if loss <= known[best] + TOLERANCE]
    cheapest = min(near, key=lambda name: _cache_share(found[name]))
    return (
        f"The lowest loss has {best} ({known[best]:.3f} nats per token). Of the layouts within {TOLERANCE} "
        f"of it ({', '.join(near)}), {cheapest} keeps the fewest keys: {_cache_share(found[cheapest]):.0%} "
        f"of MHSA's at {_CACHE_LENGTH:,} tokens."
    )


def describe_late(found: Mapping[str, Trained]) -> str:
    """Who is still catching up at the end, LS among them."""
    slopes = {name: _late_slope(arm) for name, arm in found.items()}
    known = {name: value for name, value in slopes.items() if value is not None}
    if LS.name not in known or MHSA.name not in known:
        return ""
    steepest = min(known, key=known.__getitem__)
    text = (
        "Over the second half of the training, per doubling of the steps, the loss of LS changes by "
        f"{known[LS.name]:+.3f} and MHSA's by {known[MHSA.name]:+.3f} nats per token; {steepest} falls "
        f"fastest ({known[steepest]:+.3f}). "
    )
    if known[LS.name] <= known[MHSA.name]:
        return text + "LS does not fall behind here."
    keeping_up = [name for name, value in known.items() if value <= known[MHSA.name] and name != MHSA.name]
    if not keeping_up:
        return text + "MHSA is catching up with every other layout."
    return text + f"MHSA is catching up with LS, but not with {', '.join(keeping_up)}."


def describe_rotary(found: Mapping[str, Trained]) -> str:
    """Whether local heads still help where all heads have rotary positions."""
    if LS_ROPE.name not in found or MHSA_ROPE.name not in found:
        return ""
    pair = found[LS_ROPE.name], found[MHSA_ROPE.name]
    return (
        f"Validation loss of {LS_ROPE.name} minus that of {MHSA_ROPE.name}: "
        f"{difference_text(loss_difference(*pair))} at equal steps, "
        f"{difference_text(loss_difference_at_equal_flops(*pair))} at equal FLOPs, nats per token."
    )


def _sections(chosen: _Scale, found: Mapping[str, Trained], folder: Path) -> list[Section]:
    if not found:
        return []
    found, deep = split_by_depth(found)
    rows = [
        (
            name,
            _loss_to_ls(found, name),
            number(_late_slope(arm)),
            *(number(_needle(arm, length)) for length in chosen.needle["lengths"]),
            f"{_cache_share(arm):.1%}",
        )
        for name, arm in found.items()
    ]
    lengths = [f"needle at {length:,}" for length in chosen.needle["lengths"]]
    header = ("layout", "loss − LS's", "late slope", *lengths, "cache at 32k")
    intervals = [
        (name, loss_difference(arm, found[LS.name]))
        for name, arm in found.items()
        if LS.name in found and name != LS.name
    ]
    figures = [
        Figure(_needle_figure(chosen, found, folder), "Nats per token gained by the needle, by its depth.")
    ]
    if intervals:
        file = draw_intervals(
            intervals,
            folder / "design.png",
            "Validation loss relative to LS",
            "nats per token",
            references={0.0: "LS"},
        )
        figures.insert(0, Figure(file, "Paired differences over seeds, means and 95 % intervals."))
    return [
        Section(
            "Layouts side by side",
            [chosen.setting.description, recommend(found), describe_late(found), describe_rotary(found)],
            table=arm_table(found),
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
        Section("Learning rates", table=sweep_table({**found, **deep})),
    ]


def _needle_figure(chosen: _Scale, found: Mapping[str, Trained], folder: Path) -> Path:
    panels: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for length in chosen.needle["lengths"]:
        panels[f"{length:,} tokens"] = {
            name: [
                (depth, confidence_interval(_needle_values(arm, length, depth)))
                for depth in chosen.needle["depths"]
            ]
            for name, arm in found.items()
        }
    return draw_points(
        panels, folder / "needle.png", "depth of the needle (0: beginning)", "nats per token gained",
        log_y=False, log_x_base=0,
    )  # fmt: skip


def _needle_values(arm: Trained, length: int, depth: float | None = None) -> list[float | None]:
    """By seed; the mean over depths if none is given."""
    values = []
    for result in arm.results["best"].values():
        gains = [
            cell["gain"]
            for cell in result["needle"]
            if cell["length"] == length and depth in (None, cell["depth"])
        ]
        values.append(None if None in gains else fmean(gains))
    return values


def _needle(arm: Trained, length: int) -> float | None:
    values = _needle_values(arm, length)
    return None if None in values else fmean(value for value in values if value is not None)


def _late_slope(arm: Trained) -> float | None:
    slopes = []
    for curve in arm.curves("validation_curve"):
        late = [(math.log2(step), loss) for step, loss in curve if step >= curve[-1][0] / 2]
        slopes.append(slope(late))
    return None if None in slopes else fmean(value for value in slopes if value is not None)


def _cache_share(arm: Trained) -> float:
    """Of the bytes that MHSA keeps at `_CACHE_LENGTH` tokens."""
    full = model_config(
        {name: value for name, value in arm.model.items() if name not in ("num_global_heads", "layouts")},
        {**arm.training, "mhsa": True},
    )
    config = model_config(arm.model, arm.training)
    return kv_bytes(config, _CACHE_LENGTH, torch.bfloat16) / kv_bytes(full, _CACHE_LENGTH, torch.bfloat16)


def _loss_to_ls(found: Mapping[str, Trained], name: str) -> str:
    if name == LS.name or LS.name not in found:
        return ""
    return difference_text(loss_difference(found[name], found[LS.name]))


def _mean(values: Mapping[int, float | None]) -> float:
    return confidence_interval(values.values()).mean
