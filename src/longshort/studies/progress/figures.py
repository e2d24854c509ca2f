"""Curves by progress and by tokens, and what an arm spends to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves
from longshort.studies.framework.comparison import Arms, interval_text, mean_text
from longshort.studies.language.arms import LS, MHSA, MHSA_ROPE, model_config
from longshort.studies.language.equal_progress import (
    BEGUN,
    LOSSES,
    Result,
    at_loss,
    curve_of,
    log_cost_ratio_at_loss,
    log_ratio_at_loss,
    losses_reached,
    step_at,
    values_at_loss,
)
from longshort.studies.language.trial import largest
from longshort.studies.progress.arms import Sizes
from longshort.studies.progress.design import copying_step


def main_sections(chosen: Sizes, arms: Arms, folder: Path) -> list[Section]:
    """Draw the pair and its variants by progress and by tokens, with tables of costs and by kind of head."""
    if not arms:
        return []
    panels = [
        by_progress(arms, "Largest logit by progress", "max_logit"),
        by_progress(arms, "Row range by progress", "row_range"),
        by_cost(arms, "Validation loss", "validation_curve", "nats per byte"),
        by_cost(arms, "Loss of copying", "copying_curve", "nats per token"),
    ]
    return [
        Section(
            "MHSA against LS-attention, at equal progress",
            [chosen.pair.description],
            table=_transition_table(arms),
            figures=[
                Figure(
                    draw_curves(panels, folder / "progress.png"),
                    "Above: the largest of every 16th query of 32 fixed validation windows, over the "
                    "validation loss there, which falls from right to left while a model learns. Below: by "
                    "tokens. A line per seed; where the seeds share their steps, thick: the mean.",
                )
            ],
        ),
        _group_section(arms),
    ]


def _group_section(arms: Arms) -> Section:
    """Make the table of largest logits by kind of head."""
    rows = []
    for name, arm in arms.items():
        settings = arm.settings
        layouts = model_config(settings["model"], settings["train"]).head_layouts()
        for kind in ("global", "local"):
            heads = [
                f"max_logit_layer_{layer}_head_{head}"
                for layer, layout in enumerate(layouts)
                for head in (layout.global_heads if kind == "global" else layout.local_heads)
            ]
            if heads and all(head in result["probe"] for result in arm.results() for head in heads):
                reached = losses_reached(arm.results())
                values = {
                    loss: [largest(at_loss(result, head, loss) for head in heads) for result in arm.results()]
                    for loss in reached
                }
                cells = (mean_text(values[loss]) if loss in values else "–" for loss in LOSSES)
                rows.append((f"{name}, {kind} heads", *cells))
    return Section(
        "By kind of head",
        ["The largest logit of the heads of each kind, where the validation loss first is as low; means."],
        table=Table(("largest logit at a loss of", *map(str, LOSSES)), rows),
    )


def position_sections(main: Arms, arms: Arms, all_seeds: Arms, folder: Path) -> list[Section]:
    """Draw the arms of other positions beside MHSA and LS, and compare them at equal losses.

    Args:
        main: the arms of the pair's setting.
        arms: arms of other positions, on the first seed.
        all_seeds: the same arms on all seeds, of which those after the first are shorter.
        folder: the folder for the figure.
    """
    if not arms:
        return []
    both = {**{name: main[name] for name in (MHSA.name, LS.name) if name in main}, **arms}
    panels = [
        by_progress(both, "Row range by progress", "row_range"),
        by_cost(both, "Validation loss", "validation_curve", "nats per byte"),
    ]
    return [
        Section(
            "Positions",
            ["Rotary positions, on the first seed, beside learned ones."],
            table=_transition_table(arms),
            figures=[
                Figure(
                    draw_curves(panels, folder / "positions.png"), "Lines and axes as in the figure above."
                )
            ],
        ),
        *_rotary_sections(all_seeds),
    ]


def _rotary_sections(arms: Arms) -> list[Section]:
    """Make the table of LS against MHSA with rotary positions, over all seeds; none until both have them."""
    if MHSA_ROPE.name not in arms:
        return []
    rows = []
    baseline = arms[MHSA_ROPE.name]
    for name, arm in arms.items():
        if name == baseline.arm.name:
            continue
        reached = losses_reached([*arm.results(), *baseline.results()])
        for words, ratio in (
            ("largest logit", partial(log_ratio_at_loss, arm, baseline, "max_logit")),
            ("row range", partial(log_ratio_at_loss, arm, baseline, "row_range")),
            ("tokens", partial(log_cost_ratio_at_loss, arm, baseline, "tokens")),
        ):
            cells = [interval_text(ratio(loss).exp()) if loss in reached else "–" for loss in LOSSES]
            rows.append((f"{name}, {words}", *cells))
    text = (
        f"Ratios to {baseline.arm.name} where the validation loss first is as low, at the losses that all "
        f"{len(baseline.results())} seeds reach. No claim rests on them."
    )
    return [
        Section(
            "Rotary positions, over seeds",
            [text],
            table=Table((f"relative to {baseline.arm.name}, at a loss of", *map(str, LOSSES)), rows),
        )
    ]


def loss_table(arms: Arms, quantity: str, words: str) -> Table:
    """Make a table of means over seeds of a quantity of the probe at the losses that all seeds reach."""
    rows = []
    for name, arm in arms.items():
        values = [values_at_loss(arm, quantity, loss).values() for loss in LOSSES]
        rows.append((name, *("–" if None in at else mean_text(at) for at in values)))
    return Table((f"{words} at a loss of", *map(str, LOSSES)), rows)


def clock_sections(arms: Arms) -> list[Section]:
    """Make the transition clock: what each arm spends until it begins to learn, and until it copies."""
    rows = []
    for name, arm in arms.items():
        results = arm.results()
        row = [name]
        for find in (partial(step_at, loss=BEGUN), copying_step):
            steps = [find(result) for result in results]
            row += [
                _mean_cost(steps, scale * results[0][f"{unit}_per_step"])
                for unit, scale in (("tokens", 1e-6), ("flops", 1e-12))
            ]
        rows.append(row)
    if not rows:
        return []
    text = (
        f"Million tokens and TFLOPs until the validation loss leaves the plateau, at {BEGUN} nats per byte, "
        "and until the model copies from its context; geometric means over the seeds that do. Runs that end "
        "at a given loss may end before they copy."
    )
    header = ("", "tokens to begin", "TFLOPs to begin", "tokens to copy", "TFLOPs to copy")
    return [Section("Transition clock", [text], table=Table(header, rows))]


def _mean_cost(steps: Sequence[float | None], per_step: float) -> str:
    """Format the geometric mean of what was spent, with the number of runs if not all of them have it."""
    known = [step for step in steps if step is not None]
    if not known:
        return "–"
    mean = number(per_step * math.exp(sum(map(math.log, known)) / len(known)))
    return mean if len(known) == len(steps) else f"{mean} ({len(known)} of {len(steps)} runs)"


def by_progress(arms: Arms, title: str, quantity: str) -> Panel:
    def curve(result: Result) -> list[tuple[float, float | None]]:
        losses = {step: loss for step, loss in result["validation_curve"] if step <= result["constant_until"]}
        points = curve_of(result, quantity)
        return [(losses[step], value) for step, value in points if losses.get(step) is not None]

    lines = {name: [curve(result) for result in arm.results()] for name, arm in arms.items()}
    return Panel(title, "validation loss (nats per byte)", "logits", lines)


def by_cost(arms: Arms, title: str, curve: str, y: str, unit: str = "tokens") -> Panel:
    """Make a panel of a curve, as `curve_of` names it, by the "tokens" or "flops" spent."""
    scale, label = {"tokens": (1e-6, "million tokens"), "flops": (1e-12, "TFLOPs")}[unit]
    lines = {
        name: [
            [(scale * step * result[f"{unit}_per_step"], value) for step, value in curve_of(result, curve)]
            for result in arm.results()
        ]
        for name, arm in arms.items()
    }
    return Panel(title, label, y, lines)


def _transition_table(arms: Arms) -> Table:
    """A row per arm: million tokens to leave the plateau, to each loss and to the copying drop."""
    rows = []
    for name, arm in arms.items():
        results = arm.results()
        tokens = partial(_mean_cost, per_step=1e-6 * results[0]["tokens_per_step"])
        rows.append(
            (
                name,
                *(tokens([step_at(result, loss) for result in results]) for loss in (BEGUN, *LOSSES)),
                tokens([copying_step(result) for result in results]),
                mean_text(result["constant_loss"] for result in results),
                mean_text(result["validation_loss"] for result in results),
            )
        )
    header = (
        "million tokens", *(f"to {loss}" for loss in (BEGUN, *LOSSES)), "to copying", "loss", "after decay"
    )  # fmt: skip
    return Table(header, rows)
