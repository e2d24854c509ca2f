"""Figures that studies share: curves by arm with all seeds, and values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from longshort.reporting.intervals import Interval
from longshort.reporting.style import (
    COLOURS,
    INK,
    label_log_axis,
    new_figure,
    plain_number,
    save_figure,
    scale_logarithmically,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float | None]]
"""Points (x, y); y is None where it was not finite."""

_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One panel of curves.

    Attributes:
        title, x, y: the title and the labels of the axes, with units.
        curves: one curve per seed, by arm.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[Curve]]


def draw_curves(panels: Sequence[Panel], file: Path, columns: int = 2, height: float = 3.4) -> Path:
    """Draw each arm's mean over seeds, thick, and its seeds, faint, on a logarithmic y axis. An arm has the
    same colour in all panels, and there is one legend."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns + 0.4, height * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.curves))
    for axes, panel in zip(grid.flat, panels, strict=False):
        style_axes(axes, panel.title, panel.x, panel.y)
        axes.title.set_fontsize(10)
        for arm, curves in panel.curves.items():
            _draw_arm(axes, curves, *_look(arms.index(arm)), label=arm)
        scale_logarithmically(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    shared_legend(figure, grid.flat)
    save_figure(figure, file)
    return file


def draw_intervals(
    rows: Sequence[tuple[str, Interval]],
    file: Path,
    title: str,
    x: str,
    *,
    references: Mapping[float, str] | None = None,
    log: bool = False,
) -> Path:
    """Draw a row per name, the mean as a dot and its 95 % interval as a line, with vertical references."""
    figure, axes = new_figure(title, x, "", height=1.3 + 0.36 * len(rows))
    shown = [value for _, row in rows for value in (row.mean, row.low, row.high) if math.isfinite(value)]
    shown += list(references or {})
    shown = [value for value in shown if value > 0 or not log]
    low, high = (min(shown), max(shown)) if shown else (0.1, 1.0)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        label_log_axis(axes.xaxis)
    else:
        margin = 0.08 * (high - low or 1.0)
        axes.set_xlim(low - margin, high + margin)
    left, right = axes.get_xlim()
    for line, (_, row) in enumerate(rows):
        if math.isfinite(row.mean):
            axes.plot(row.mean, line, "o", color=COLOURS[0], ms=5)
        if not math.isnan(row.low):
            axes.hlines(line, max(row.low, left), min(row.high, right), color=COLOURS[0], lw=1.8)
    for value, name in (references or {}).items():
        axes.axvline(value, color=COLOURS[1], lw=1, ls="--")
        axes.annotate(
            name, (value, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=8, color=COLOURS[1],
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    save_figure(figure, file)
    return file


def draw_points(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]],
    file: Path,
    x: str | Sequence[str],
    y: str | Sequence[str],
    *,
    log_y: bool = True,
    log_x_base: int = 2,
) -> Path:
    """Draw a panel per title, with a line per arm through means with their 95 % intervals.

    Args:
        panels: points (x, interval), by title, then arm.
        file: the PNG; an old one is replaced.
        x: label of the x axes, or one for each panel.
        y: label of the y axis that all panels share, or one for each panel's own axis.
        log_y: logarithmic y axes.
        log_x_base: base of logarithmic x axes; 0: linear.
    """
    figure = Figure(figsize=(max(4.5, min(4.1 * len(panels) + 0.4, 9.0)), 4.0), layout="constrained")
    is_shared = isinstance(y, str)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=is_shared)[0]
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines))
    x_labels = [x] * len(panels) if isinstance(x, str) else x
    y_labels = [y, *[""] * (len(panels) - 1)] if is_shared else y
    means = {
        title: [row.mean for line in lines.values() for _, row in line if math.isfinite(row.mean)]
        for title, lines in panels.items()
    }
    if is_shared:
        means = {key: [mean for values in means.values() for mean in values] for key in panels}
    for axes, x_label, y_label, (title, lines) in zip(grid, x_labels, y_labels, panels.items(), strict=True):
        style_axes(axes, title, x_label, y_label)
        axes.title.set_fontsize(10)
        for arm, line in lines.items():
            colour, style = _look(arms.index(arm))
            points = [(at, row) for at, row in line if math.isfinite(row.mean)]
            axes.plot([at for at, _ in points], [row.mean for _, row in points], style, marker="o", ms=4,
                      color=colour, label=arm)  # fmt: skip
            known = [(at, row) for at, row in points if row.is_known]
            axes.vlines(
                [at for at, _ in known],
                [max(row.low, 1e-3 * row.mean) if log_y else row.low for _, row in known],
                [row.high for _, row in known], color=colour, lw=1, alpha=0.6,
            )  # fmt: skip
        if log_y and means[title] and min(means[title]) > 0:
            axes.set_yscale("log")
            axes.set_ylim(min(means[title]) / 2, max(means[title]) * 2)
            label_log_axis(axes.yaxis)
        _label_lengths(axes, [at for line in lines.values() for at, _ in line], log_x_base)
    shared_legend(figure, grid)
    save_figure(figure, file)
    return file


def _draw_arm(axes: Axes, curves: Sequence[Curve], colour: str, style: str, label: str) -> None:
    tables = [
        np.array([(x, math.nan if y is None else y) for x, y in curve], dtype=float) for curve in curves
    ]
    tables = [table for table in tables if len(table)]
    if not tables:
        return
    if len(tables) > 1:
        for table in tables:
            axes.plot(table[:, 0], table[:, 1], style, color=colour, lw=0.8, alpha=0.3)
    same_x = all(len(table) == len(tables[0]) and (table[:, 0] == tables[0][:, 0]).all() for table in tables)
    if same_x:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.exp(np.mean(np.log(np.stack([table[:, 1] for table in tables])), axis=0))
        axes.plot(tables[0][:, 0], mean, style, color=colour, lw=1.9, label=label)
    else:
        axes.plot([], [], style, color=colour, lw=1.9, label=label)


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], _STYLES[index // len(COLOURS) % len(_STYLES)]


def _label_lengths(axes: Axes, values: Sequence[float], base: int = 2) -> None:
    ticks = sorted(set(values))
    if base and ticks and ticks[0] > 0:
        axes.set_xscale("log", base=base)
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))


def shared_legend(figure: Figure, panels: Iterable[Axes], columns: int = 3) -> None:
    """Add one legend below all panels."""
    handles = {}
    for axes in panels:
        handles |= {name: mark for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=min(columns, len(handles)),
            frameon=False, fontsize=9, labelcolor=INK,
        )  # fmt: skip
