"""The figures of the study `dense-local`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from longshort.reporting.intervals import Interval
from longshort.reporting.plots import shared_legend
from longshort.reporting.style import COLOURS, INK, new_figure, plain_number, save_figure, style_axes
from longshort.studies.dense_local.task import LOSS_FLOOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

_LEAST_DRAWN = 1e-7  # the smallest probability on the colour scale
_RATIOS = (1 / 30, 30.0)  # the ends of the colour scale


def draw_heat_maps(matrices: Mapping[str, Sequence[Sequence[float]]], first: int, file: Path) -> Path:
    """Draw probabilities by query and key, a panel for each matrix, on one colour scale.

    Args:
        matrices: square matrices, by title.
        first: position of the first row and column.
    """
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    colours = LogNorm(_LEAST_DRAWN, 1.0)
    shades = colormaps["cividis"].with_extremes(under="#f2f2f2")
    image = None
    for axes, (title, rows) in zip(panels, matrices.items(), strict=True):
        values = np.maximum(np.array(rows, dtype=float), _LEAST_DRAWN / 10)
        last = first + len(values) - 1
        image = axes.imshow(
            values, cmap=shades, norm=colours, interpolation="nearest",
            extent=(first - 0.5, last + 0.5, last + 0.5, first - 0.5),
        )  # fmt: skip
        style_axes(axes, title, "key (token)", "query (token)" if axes is panels[0] else "")
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(visible=False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), label="probability", extend="min", shrink=0.8, pad=0.02)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    save_figure(figure, file)
    return file


def draw_grid(tables: Mapping[str, Mapping[tuple[str, str], Interval | None]], file: Path) -> Path:
    """Draw ratios local / global by row and column, a panel per title: means with their 95 % intervals.

    Purple is for local attention, orange against it; a cell is bold if the interval excludes 1.

    Args:
        tables: intervals of log-ratios, by title, then (row, column); None: not run.
    """
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    colours = LogNorm(*_RATIOS)
    image = None
    for axes, (title, cells) in zip(panels, tables.items(), strict=True):
        rows, columns = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
        values = np.full((len(rows), len(columns)), math.nan)
        for (row, column), interval in cells.items():
            at = rows.index(row), columns.index(column)
            values[at] = math.nan if interval is None else interval.exp().mean
            _write_cell(axes, at, interval)
        image = axes.imshow(np.clip(values, *_RATIOS), cmap="PuOr_r", norm=colours, aspect="auto")
        style_axes(axes, title, "window w / dependency l'", "dependency l' / head_dim d")
        axes.title.set_fontsize(10)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), label="local / global", extend="both", pad=0.02)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    save_figure(figure, file)
    return file


def _write_cell(axes: Axes, at: tuple[int, int], interval: Interval | None) -> None:
    if interval is None or not math.isfinite(interval.mean):
        text, weight, dark = "–", "normal", False
    else:
        ratio = interval.exp()
        text = f"{_ratio(ratio.mean)}\n[{_ratio(ratio.low)}, {_ratio(ratio.high)}]"
        excludes = interval.high < 0 or interval.low > 0
        weight, dark = "bold" if excludes else "normal", abs(interval.mean) > 0.6 * math.log(_RATIOS[1])
    axes.text(
        at[1], at[0], text, ha="center", va="center", fontsize=7, fontweight=weight,
        color="white" if dark else INK,
    )  # fmt: skip


def _ratio(value: float) -> str:
    """Format a ratio with two digits."""
    if 0 < value < 0.0095 or (math.isfinite(value) and value >= 9999.5):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if 0.0995 <= value < 9.95:
        return f"{value:.2f}"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def draw_bounds(
    bounds: Mapping[str, Points], measured: Mapping[str, Points], paths: Mapping[str, Points], file: Path
) -> Path:
    """Draw losses by the largest logit.

    Args:
        bounds: lower bounds of the loss, drawn as dotted lines.
        measured: single fits, drawn as dots.
        paths: fits from the first step to the last, drawn as lines.
    """
    figure, axes = new_figure(
        "How large logits must be for a loss", "largest |scale · q·k|", "loss (nats)", height=4.4
    )
    for (name, points), colour in zip(bounds.items(), ("#777777", "#222222"), strict=False):
        axes.plot(*_columns(points), ":", lw=1.6, color=colour, label=name)
    for (name, points), colour in zip(paths.items(), COLOURS[1::-1], strict=False):
        axes.plot(*_columns(points), "-", lw=1.4, color=colour, label=name)
    for (name, points), colour in zip(measured.items(), COLOURS[2:], strict=False):
        axes.plot(*_columns(points), "D", ms=5, color=colour, label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=LOSS_FLOOR)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    shared_legend(figure, [axes], columns=2)
    save_figure(figure, file)
    return file


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
