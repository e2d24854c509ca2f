"""The plot of a benchmark: a metric by tokens, a line for each provider."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from longshort.reporting.style import COLOURS, INK, label_log_axis, plain_number, save_figure, style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from longshort.bench.benchmark import Benchmark

_GREY = "#777777"
_MARKERS = "osD^v<>"
_LEAST = 1e-6  # shown for 0, such as no rise of memory, which a logarithmic axis cannot show
_SMALLEST_RANGE = 5.0  # highest to lowest value of a y axis, so that at least two ticks have a number


def plot_rows(rows: pd.DataFrame, benchmark: Benchmark | type[Benchmark], file: Path) -> None:
    """Draw the first column of a benchmark's table as a PNG; an old file is replaced.

    Medians by tokens are on logarithmic axes; bars reach from the 10th to the 90th percentile.

    Args:
        rows: rows of the benchmark, as `longshort.bench.record` describes them; a panel is a setting.
        benchmark: the benchmark.
        file: the PNG.

    Raises:
        ValueError: there are no rows.
    """
    if rows.empty:
        raise ValueError("rows must hold at least one row, got none")
    column, others = benchmark.table[0], [name for name in benchmark.known if name != benchmark.baseline]
    looks = {name: _look(number) for number, name in enumerate(others)} | {benchmark.baseline: (_GREY, "o")}
    settings = list(dict.fromkeys(rows["setting"]))
    across = min(2, len(settings))
    down = -(-len(settings) // across)
    figure = Figure(figsize=(max(6.5, 5.4 * across), 1.1 + 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    handles = {}
    for axes, setting in zip(panels.flat, settings, strict=False):
        style_axes(axes, fill(setting, 55), "tokens", benchmark.y_label)
        axes.title.set(fontsize=9, fontweight="normal")
        shown = rows.query("setting == @setting").sort_values("x")
        for provider in shown["provider"].unique():
            line = shown.query("provider == @provider and metric == @column.metric")
            _draw_line(axes, line, column.scale, provider, looks.get(provider, (INK, "o")))
        if benchmark.bound is not None:
            label, *shown_as = benchmark.bound
            line = shown[shown[["provider", "metric"]].eq(shown_as).all(axis=1)]
            axes.plot(line["x"], line["p50"], "--", color=_GREY, lw=1.2, label=label if len(line) else None)
        _scale(axes, sorted(set(shown["x"])))
        handles |= {name: mark for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in panels.flat[len(settings) :]:
        axes.set_visible(False)
    first = rows.iloc[0]
    accelerator = first["accelerator"]
    where = first["processor"] if pd.isna(accelerator) else accelerator
    machine = f"{where}, torch {first['torch_version']}"
    figure.suptitle(f"{benchmark.title}\n{machine}", x=0.01, ha="left", fontsize=11, color=INK)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower left", ncols=min(4, len(handles)), frameon=False,
        fontsize=9, labelcolor=INK,
    )  # fmt: skip
    save_figure(figure, file)


def _look(number: int) -> tuple[str, str]:
    """Return a colour and a marker for each of a few dozen lines."""
    colours = (*COLOURS, INK)
    return colours[number % len(colours)], _MARKERS[number // len(colours)]


def _draw_line(axes: Axes, line: pd.DataFrame, scale: float, provider: str, look: tuple[str, str]) -> None:
    colour, marker = look
    p10, p50, p90 = (np.maximum(scale * line[name].to_numpy(float), _LEAST) for name in ("p10", "p50", "p90"))
    axes.errorbar(
        line["x"], p50, np.maximum([p50 - p10, p90 - p50], 0), fmt=f"{marker}-", ms=4, lw=1.6, elinewidth=1,
        color=colour, label=provider,
    )  # fmt: skip


def _scale(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    widening = max(1.0, (_SMALLEST_RANGE * low / high) ** 0.5)
    axes.set_ylim(low / widening, high * widening)
    label_log_axis(axes.yaxis)
