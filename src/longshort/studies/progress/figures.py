"""Curves by progress and by tokens, and what an arm spends to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves
from longshort.studies.framework.comparison import Arms, mean_text
from longshort.studies.language.arms import LS, MHSA
from longshort.studies.language.equal_progress import BEGUN, LOSSES, Result, step_at
from longshort.studies.progress.arms import Sizes
from longshort.studies.progress.design import copying_step


def main_sections(chosen: Sizes, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    panels = [
        by_progress(arms, "Largest logit by progress", "max_logit"),
        by_progress(arms, "Row range by progress", "row_range"),
        by_tokens(arms, "Validation loss", "validation_curve", "nats per byte"),
        by_tokens(arms, "Loss of copying", "copying_curve", "nats per byte"),
    ]
    return [
        Section(
            "MHSA against LS-attention, at equal progress",
            [chosen.pair.description],
            table=_transition_table(arms),
            figures=[
                Figure(
                    draw_curves(panels, folder / "progress.png"),
                    "Above: on 32 fixed validation windows, over the validation loss there, which falls from "
                    "right to left while a model learns. Below: by tokens. A line per seed; where the seeds "
                    "share their steps, thick: the mean.",
                )
            ],
        )
    ]


def position_sections(main: Arms, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    both = {**{name: main[name] for name in (MHSA.name, LS.name) if name in main}, **arms}
    panels = [
        by_progress(both, "Row range by progress", "row_range"),
        by_tokens(both, "Validation loss", "validation_curve", "nats per byte"),
    ]
    return [
        Section(
            "Positions",
            ["Learned positions beside rotary ones, on the first seed."],
            table=_transition_table(arms),
            figures=[Figure(draw_curves(panels, folder / "positions.png"), "As above.")],
        )
    ]


def by_progress(arms: Arms, title: str, quantity: str) -> Panel:
    def curve(result: Result) -> list[tuple[float, float | None]]:
        losses = {step: loss for step, loss in result["validation_curve"] if step <= result["constant_until"]}
        values = zip(result["probe"]["step"], result["probe"][quantity], strict=True)
        return [(losses[step], value) for step, value in values if losses.get(step) is not None]

    lines = {name: [curve(result) for result in arm.results()] for name, arm in arms.items()}
    return Panel(title, "validation loss (nats per byte)", "logits", lines)


def by_tokens(arms: Arms, title: str, name: str, y: str) -> Panel:
    lines = {
        arm_name: [
            [(1e-6 * step * result["tokens_per_step"], value) for step, value in result[name]]
            for result in arm.results()
        ]
        for arm_name, arm in arms.items()
    }
    return Panel(title, "million tokens", y, lines)


def by_cost(arms: Arms, title: str, unit: str) -> Panel:
    """Make a panel of validation losses by the "tokens" or "flops" spent."""
    scale, label = {"tokens": (1e-6, "million tokens"), "flops": (1e-12, "TFLOPs")}[unit]
    lines = {
        name: [
            [(scale * step * result[f"{unit}_per_step"], value) for step, value in result["validation_curve"]]
            for result in arm.results()
        ]
        for name, arm in arms.items()
    }
    return Panel(title, label, "nats per byte", lines)


def _transition_table(arms: Arms) -> Table:
    """A row per arm: what it spends to leave the plateau, to each loss and to the copying drop."""
    rows = []
    for name, arm in arms.items():
        results = arm.results()

        def tokens(steps: Sequence[float | None], per_step: float = results[0]["tokens_per_step"]) -> str:
            known = [step for step in steps if step is not None]
            if not known:
                return "–"
            mean = number(1e-6 * per_step * math.exp(sum(map(math.log, known)) / len(known)))
            return mean if len(known) == len(steps) else f"{mean} ({len(known)} of {len(steps)} runs)"

        rows.append(
            (
                name,
                *(tokens([step_at(result, loss) for result in results]) for loss in (BEGUN, *LOSSES)),
                tokens([copying_step(result) for result in results]),
                mean_text(result["constant_loss"] for result in results),
                mean_text(result["validation_loss"] for result in results),
            )
        )
    header = ("", *(f"to {loss}" for loss in (BEGUN, *LOSSES)), "to copying", "loss", "after decay")
    return Table(header, rows)
