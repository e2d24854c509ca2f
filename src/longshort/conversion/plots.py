"""Figures of inspections, conversions and healings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from longshort.conversion.heads import DecoderHeads, Kept, KVHead
from longshort.reporting.plots import shared_legend
from longshort.reporting.style import COLOURS, FAINT, INK, new_figure, plain_number, save_figure, style_axes


def draw_heads(
    heads: DecoderHeads, kept: Kept, measures: Mapping[str, Mapping[KVHead, float]], file: Path
) -> Path:
    """Draw maps of layers × key/value heads: each measure, and which heads keep the distance."""
    panels = len(measures) + 1
    rows = heads.num_layers
    columns = max(layer.num_kv_heads for layer in heads.layers)
    width = max(1.6, 0.22 * columns + 1.0)
    figure = Figure(figsize=(width * panels + 0.6, min(12.0, 0.16 * rows + 1.6)), layout="constrained")
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes, (name, values) in zip(grid, measures.items(), strict=False):
        table = _table(heads, values, rows, columns)
        shown = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
        bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.9, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.ax.xaxis.set_major_locator(_two_ticks(table))
        _label_map(axes, name, columns)
    table = _table(heads, {head: float(head in kept) for head in heads.candidates}, rows, columns)
    grid[-1].imshow(
        table,
        aspect="auto",
        cmap=ListedColormap([FAINT, COLOURS[0]]),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    _label_map(grid[-1], f"global: {len(kept)} of {len(heads.candidates)}", columns)
    grid[0].set_ylabel("layer")
    save_figure(figure, file)
    return file


def draw_rises(rises: Mapping[str, float], proposed: str, file: Path) -> Path:
    """Draw the rise of the loss of each layout as a bar."""
    figure, axes = new_figure(
        "", "rise of the held-out loss (nats per token)", "", height=1.0 + 0.3 * len(rises)
    )
    names = list(rises)
    colours = [COLOURS[0] if name == proposed else FAINT for name in names]
    axes.barh(range(len(names)), list(rises.values()), color=colours, height=0.65)
    for line, value in enumerate(rises.values()):
        axes.annotate(f"{value:.3f}", (max(value, 0), line), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    save_figure(figure, file)
    return file


def draw_positions(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], file: Path
) -> Path:
    """Draw the loss by position in the window, before and after."""
    figure, axes = new_figure(
        "Loss by position", "position in the window", "loss (nats per token)", height=3.6
    )
    for index, (name, bins) in enumerate((("before", before), ("after", after))):
        middles = [(entry["first"] * entry["last"]) ** 0.5 for entry in bins]
        axes.plot(middles, [entry["loss"] for entry in bins], "o-", ms=4, color=COLOURS[index], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.legend(frameon=False)
    save_figure(figure, file)
    return file


def draw_needles(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Draw the gain from needles by length and depth, before and after, as two maps."""
    lengths = sorted({cell["length"] for cell in before})
    depths = sorted({cell["depth"] for cell in before})
    figure = Figure(figsize=(7.5, 1.4 + 0.5 * len(depths)), layout="constrained")
    grid = figure.subplots(1, 2, squeeze=False, sharey=True)[0]
    most = max(1.0, *(cell["gain"] for cells in (before, after) for cell in cells))
    for axes, name, cells in zip(grid, ("before", "after"), (before, after), strict=True):
        gains = {(cell["depth"], cell["length"]): cell["gain"] for cell in cells}
        table = np.array([[gains[depth, length] for length in lengths] for depth in depths])
        axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=most)
        for (row, column), value in np.ndenumerate(table):
            ink = "white" if value < 0.6 * most else "black"
            axes.text(
                column, row, f"{round(value, 1) + 0.0:.1f}", ha="center", va="center", fontsize=9, color=ink
            )
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("tokens in the window")
        axes.tick_params(length=0)
    grid[0].set_ylabel("depth")
    save_figure(figure, file)
    return file


def draw_curve(
    curves: Mapping[str, Sequence[Mapping[str, float]]], levels: Mapping[str, float], file: Path
) -> Path:
    """Draw held-out losses over training steps, and levels to compare them with."""
    figure, axes = new_figure("Held-out loss", "optimizer step", "loss (nats per token)", height=3.8)
    for index, (name, lines) in enumerate(curves.items()):
        measured = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        axes.plot(*zip(*measured, strict=True), "o-", ms=4, color=COLOURS[index], label=name)
    for index, (name, level) in enumerate(levels.items(), start=len(curves)):
        axes.axhline(level, ls="--", lw=1.2, color=COLOURS[index % len(COLOURS)], label=name)
    shared_legend(figure, [axes])
    save_figure(figure, file)
    return file


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str, file: Path
) -> Path:
    """Draw lines through points on logarithmic axes, one per name."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, x, y)
    for index, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=COLOURS[index], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.legend(frameon=False)
    save_figure(figure, file)
    return file


def _table(heads: DecoderHeads, values: Mapping[KVHead, float], rows: int, columns: int) -> np.ndarray:
    table = np.full((rows, columns), np.nan)
    for head, value in values.items():
        table[head.layer, head.head] = value
    return table


def _two_ticks(table: np.ndarray) -> Any:
    return FixedLocator([float(np.nanmin(table)), float(np.nanmax(table))])


def _label_map(axes: Any, title: str, columns: int) -> None:
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
    axes.set_xticks(range(columns), [str(column) for column in range(columns)] if columns <= 16 else [])
    axes.set_xlabel("KV head", fontsize=8)
    axes.tick_params(length=0, labelsize=8)
