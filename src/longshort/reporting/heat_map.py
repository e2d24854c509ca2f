"""Heat maps of numbers by layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longshort.reporting.style import label_log_axis, save_figure, style_axes

ByHead = Sequence[Sequence[float | None]]
"""A number for each layer and head; None where it is not known."""

_CELL = 0.28  # inches


def draw_heat_maps(panels: Mapping[str, ByHead], file: Path, logarithmic: Sequence[str] = ()) -> Path:
    """Draw a panel per title: layers from top to bottom, heads from left to right, each with its scale,
    which begins at 0 if it is not logarithmic.

    Args:
        panels: the numbers by title; layers may have unequal numbers of heads.
        file: the PNG; an old one is replaced.
        logarithmic: titles of the panels with a logarithmic scale, for numbers > 0.
    """
    tables = {title: _table(by_head) for title, by_head in panels.items()}
    layers = max(table.shape[0] for table in tables.values())
    heads = max(table.shape[1] for table in tables.values())
    width = min(max(_CELL * heads, 2.6), 6.0) + 1.2
    height = min(max(_CELL * layers, 1.6), 12.0) + 1.1
    figure = Figure(figsize=(width * len(tables), height), layout="constrained")
    grid = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, table) in zip(grid, tables.items(), strict=True):
        style_axes(axes, title, "head", "layer")
        axes.grid(visible=False)
        axes.title.set_fontsize(10)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        known = table[np.isfinite(table) & (table > 0)]
        is_log = title in logarithmic and known.size > 0 and known.min() < known.max()
        norm = LogNorm(known.min(), known.max()) if is_log else Normalize(0, known.max() if known.size else 1)
        image = axes.imshow(table, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        if is_log:
            label_log_axis(bar.ax.yaxis)
    save_figure(figure, file)
    return file


def _table(by_head: ByHead) -> np.ndarray:
    width = max((len(heads) for heads in by_head), default=0)
    table = np.full((max(len(by_head), 1), max(width, 1)), np.nan)
    for row, heads in enumerate(by_head):
        table[row, : len(heads)] = [np.nan if value is None else value for value in heads]
    return table
