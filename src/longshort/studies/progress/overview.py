"""The figure that says it: logits at equal progress, and losses by tokens, of MHSA and LS-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from longshort.reporting.page import Figure, Section
from longshort.reporting.plots import shared_legend
from longshort.reporting.style import COLOURS, save_figure, scale_logarithmically, style_axes
from longshort.studies.language.arms import LS, MHSA
from longshort.studies.language.equal_progress import Result, at_loss, curve_of, step_at
from longshort.studies.progress.design import copying_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FILE = "equal_progress.png"
_HIGHEST_LOSS = 2.6  # nats per byte; above it only frequencies of bytes are learned
_LOSS_STEP = 0.02
_PAPER_FACTOR = 20

Runs = Mapping[str, Sequence[Result]]
"""Results of the seeds that are done, by arm."""


def overview_sections(runs: Runs, folder: Path) -> list[Section]:
    """Draw the figure from the results of MHSA and LS so far; none without any."""
    runs = {name: runs[name] for name in (MHSA.name, LS.name) if runs.get(name)}
    if not runs:
        return []
    seeds = ", ".join(f"{name} on {len(results)}" for name, results in runs.items())
    caption = (
        "Left: the largest attention logit of every 16th query of 32 fixed validation windows over the "
        "validation loss there, at the constant learning rate; progress goes to the right. Right: that loss "
        f"by tokens, to the end of the decay. Thin: seeds ({seeds}); thick: their mean at equal loss; dots: "
        "where a run begins to copy from its context; dashed: 1/20 of MHSA, which the paper sees LS below."
    )
    return [
        Section(
            "Logits at equal progress", figures=[Figure(draw_overview(runs, folder / FIGURE_FILE), caption)]
        )
    ]


def draw_overview(runs: Runs, file: Path) -> Path:
    """Draw the largest logit by loss, and the loss by tokens.

    Args:
        runs: results of one or more seeds, by arm.
        file: the PNG; an old one is replaced.
    """
    canvas = Canvas(figsize=(8.6, 4.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    style_axes(left, "Largest logit by progress", "validation loss (nats per byte)", "largest |scale · q·k|")
    style_axes(right, "Loss by tokens", "million tokens", "validation loss (nats per byte)")
    for index, (name, results) in enumerate(runs.items()):
        colour = COLOURS[index]
        for result in results:
            _draw_seed(left, right, result, colour)
        mean = mean_by_loss(results)
        if mean:
            left.plot(*zip(*mean, strict=True), color=colour, lw=2.2)
            if name == MHSA.name:
                shown = [(loss, value / _PAPER_FACTOR) for loss, value in mean]
                left.plot(*zip(*shown, strict=True), "--", color=colour, lw=1.4)
        right.plot([], [], color=colour, lw=2.2, label=name)
        if name == MHSA.name:
            right.plot([], [], "--", color=colour, lw=1.4, label=f"{name}/{_PAPER_FACTOR}")
    right.plot([], [], "o", color="none", mec="black", label="begins to copy")
    scale_logarithmically(left)
    left.set_xlim(_HIGHEST_LOSS, left.get_xlim()[0])
    right.set_ylim(top=_HIGHEST_LOSS)
    left.yaxis.set_minor_locator(NullLocator())
    shared_legend(canvas, [right], columns=4)
    save_figure(canvas, file)
    return file


def _draw_seed(left: Axes, right: Axes, result: Result, colour: str) -> None:
    losses = {step: loss for step, loss in result["validation_curve"] if loss is not None}
    logits = {step: value for step, value in curve_of(result, "max_logit") if value is not None}
    million = 1e-6 * result["tokens_per_step"]
    points = [
        (loss, logits[step])
        for step, loss in losses.items()
        if step <= result["constant_until"] and step in logits and loss <= _HIGHEST_LOSS
    ]
    left.plot([x for x, _ in points], [y for _, y in points], color=colour, lw=0.8, alpha=0.45)
    right.plot([million * step for step in losses], list(losses.values()), color=colour, lw=1.0, alpha=0.8)
    step = copying_step(result)
    if step is not None and step in losses:
        dot = {"marker": "o", "ms": 7, "mfc": colour, "mec": "white", "zorder": 5}
        right.plot([million * step], [losses[step]], **dot)
        if step in logits:
            left.plot([losses[step]], [logits[step]], **dot)


def mean_by_loss(results: Sequence[Result]) -> list[tuple[float, float]]:
    """Compute the geometric mean of the largest logit over seeds where their losses first are equally low, at
    the losses that all of them reach."""
    mean = []
    loss = _HIGHEST_LOSS
    while all(step_at(result, loss) is not None for result in results):
        values = [at_loss(result, "max_logit", loss) for result in results]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            mean.append((loss, math.exp(fmean(map(math.log, known)))))
        loss = round(loss - _LOSS_STEP, 6)
        if loss <= 0:
            break
    return mean
