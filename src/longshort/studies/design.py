"""Study `design` (beyond the paper): how many global heads, which windows, in which layers?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longshort.model import kv_bytes
from longshort.studies.comparison import (
    Trained,
    arm_table,
    difference_text,
    loss_difference,
    plan_arms,
    predictions,
    sweep_table,
    trained_arms,
)
from longshort.studies.figures import draw_intervals, draw_points
from longshort.studies.language import Arm, LanguageStudy, Setting, model_config
from longshort.studies.settings import LS, MHSA, PAPER_SMALL, tiny, with_model
from longshort.studies.statistics import Interval, confidence_interval, paired_difference, slope
from longshort.studies.study import Claim, Findings, Outcome, Plan, Results, Scale, Verdict
from longshort.training.report import Figure, Section, Table, number

TOLERANCE = 0.02
"""Nats per byte: losses nearer than this are called alike."""

_CACHE_LENGTH = 32_768

ENOUGH = Claim(
    "design: one global head",
    "One global head per layer is enough: more of them do not lower the loss.",
    f"With all heads global the loss is lower by more than {TOLERANCE} nats per byte.",
    "The 95 % interval of the validation loss, one global head minus all heads global, paired over seeds, "
    f"each at its best rate. Shown: upper end below {TOLERANCE}. Contradicted: lower end above {TOLERANCE}. "
    "Otherwise not shown.",
)
NEEDED = Claim(
    "design: a global head",
    "A global head is needed: with local heads alone the loss is higher.",
    "Without global heads the loss is as low.",
    "The 95 % interval of the validation loss, no global head minus one, paired over seeds. Shown: lower end "
    "above 0. Contradicted: upper end below 0. Otherwise not shown.",
)
SPREAD = Claim(
    "design: spread",
    "The same number of global heads does better spread over every layer than gathered in one.",
    "Gathered in one layer they do as well or better.",
    "95 % intervals of the validation loss, gathered minus spread, paired over seeds, for each place. Shown: "
    "lower ends above 0 for all. Partly: for one. Contradicted: upper ends below 0 for all. Otherwise not "
    "shown.",
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
LS_ROPE = with_model(LS, "LS + RoPE", position_embedding="rope")
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
        (LS_ROPE, NO_POSITIONS), LS, _NEEDLE,
    ),
    "overnight": _Scale(
        tiny(1024, batch=4, steps=6000), 5, _counts(0, 2), (*_windows(8, 32, 64, 128, 256, 512), MIXED),
        DEEP_GATHERED, (LS_ROPE, NO_POSITIONS), DEEP,
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
        (LS_ROPE, NO_POSITIONS), LS, {"lengths": [512, 2048], "depths": [0.1, 0.5, 0.9], "samples": 128},
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
        return plan_arms(chosen.setting, _arms(chosen), seeds, results, at_lower=False)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = _SCALES[scale]
        found = trained_arms(chosen.setting, _arms(chosen), seeds, results, at_lower=False)
        verdicts = [
            _judge_enough(found),
            _judge_needed(found),
            _judge_spread(found, chosen.spread.name, [arm.name for arm in chosen.gathered]),
        ]
        return Findings(verdicts, _sections(chosen, found, folder), predictions(found))


def _arms(chosen: _Scale) -> list[Arm]:
    arms = (LS, MHSA, chosen.spread, *chosen.counts, *chosen.windows, *chosen.gathered, *chosen.positions)
    by_name = {arm.name: replace(arm, measure={"needle": chosen.needle}) for arm in arms}
    return list(by_name.values())


def _judge_enough(found: Mapping[str, Trained]) -> Verdict:
    if LS.name not in found or MHSA.name not in found:
        return Verdict(ENOUGH, Outcome.NOT_MEASURED, "The trials are not done.")
    difference = loss_difference(found[LS.name], found[MHSA.name])
    outcome = Outcome.NOT_SHOWN
    if difference.high < TOLERANCE:
        outcome = Outcome.SHOWN
    elif difference.low > TOLERANCE:
        outcome = Outcome.CONTRADICTED
    return Verdict(
        ENOUGH, outcome, f"One global head minus all: {difference_text(difference)} nats per byte."
    )


def _judge_needed(found: Mapping[str, Trained]) -> Verdict:
    none = _counts(0)[0].name
    if LS.name not in found or none not in found:
        return Verdict(NEEDED, Outcome.NOT_MEASURED, "The trials are not done.")
    difference = loss_difference(found[none], found[LS.name])
    return Verdict(
        NEEDED, _sign([difference]), f"No global head minus one: {difference_text(difference)} nats per byte."
    )


def _judge_spread(found: Mapping[str, Trained], spread: str, gathered: Sequence[str]) -> Verdict:
    if any(name not in found for name in (spread, *gathered)):
        return Verdict(SPREAD, Outcome.NOT_MEASURED, "The trials are not done.")
    differences = {name: loss_difference(found[name], found[spread]) for name in gathered}
    texts = [f"{name}: {difference_text(interval)}" for name, interval in differences.items()]
    return Verdict(
        SPREAD, _sign(list(differences.values())), f"Minus {spread}, nats per byte: {'; '.join(texts)}."
    )


def _sign(intervals: Sequence[Interval]) -> Outcome:
    above = [interval.low > 0 for interval in intervals]
    if all(above):
        return Outcome.SHOWN
    if all(interval.high < 0 for interval in intervals):
        return Outcome.CONTRADICTED
    return Outcome.PARTLY if any(above) else Outcome.NOT_SHOWN


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
        f"The lowest loss has {best} ({known[best]:.3f} nats per byte). Of the layouts within {TOLERANCE} of "
        f"it ({', '.join(near)}), {cheapest} keeps the fewest keys: {_cache_share(found[cheapest]):.0%} of "
        f"MHSA's at {_CACHE_LENGTH:,} tokens."
    )


def _sections(chosen: _Scale, found: Mapping[str, Trained], folder: Path) -> list[Section]:
    if not found:
        return []
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
            "nats per byte",
            references={0.0: "LS"},
        )
        figures.insert(0, Figure(file, "Paired differences over seeds, means and 95 % intervals."))
    return [
        Section(
            "Layouts side by side", [chosen.setting.description, recommend(found)], table=arm_table(found)
        ),
        Section(
            "What they can do, and what they cost",
            [
                (
                    "Late slope: change of the validation loss per doubling of the steps, over the second "
                    "half of the training; where it is more negative, the layout is still catching up. "
                    "Needle: how much more likely, in nats per byte, a random string becomes when it stood "
                    "earlier in the text; models are not trained on that task. Cache: keys and values kept "
                    "at 32,768 tokens, relative to MHSA."
                )
            ],
            table=Table(header, rows),
            figures=figures,
        ),
        Section("Learning rates", table=sweep_table(found)),
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
        panels, folder / "needle.png", "depth of the needle (0: beginning)", "nats per byte gained",
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
    values = found[name].values("validation_loss")
    return difference_text(paired_difference(values, found[LS.name].values("validation_loss")))


def _mean(values: Mapping[int, float | None]) -> float:
    return confidence_interval(values.values()).mean
