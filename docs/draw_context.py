"""Draws who sends what in context parallelism, by the plan that the ranks follow:

python docs/draw_context.py docs/images/context-parallel.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from longshort.distributed import plan_context
from longshort.reporting.style import COLOURS, FAINT, INK, save_figure

RANKS, LENGTH, WINDOW = 4, 512, 40
PART = LENGTH // RANKS
PALE = ["#cfe3f1", "#f6d7c4", "#c6e7dc", "#f2dce8"]


def draw() -> Figure:
    """Draw the ranks and their messages above the masks of a local and of a global head."""
    figure = Figure(figsize=(7.5, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(0.72, 1))
    _draw_messages(figure.add_subplot(grid[0, :]))
    _draw_mask(figure.add_subplot(grid[1, 0]), "Local head: its own queries, a halo of keys", _local_owner())
    _draw_mask(figure.add_subplot(grid[1, 1]), "Global head: all keys, some queries lent", _global_owner())
    return figure


def _draw_messages(axes: Any) -> None:
    axes.set_xlim(-0.05, RANKS + 0.05)
    axes.set_ylim(-0.98, 1.45)
    axes.axis("off")
    axes.set_title(
        f"One sequence on {RANKS} ranks: what travels in a layer", loc="left", fontsize=12, fontweight="bold",
        color=INK,
    )  # fmt: skip
    for rank in range(RANKS):
        axes.add_patch(Rectangle((rank + 0.04, 0), 0.92, 0.34, facecolor=PALE[rank], edgecolor=COLOURS[rank]))
        axes.text(
            rank + 0.5, 0.17, f"rank {rank}: tokens of part {rank}", ha="center", va="center", fontsize=8.5
        )
    for rank in range(RANKS - 1):
        _arrow(axes, (rank + 0.86, 0.34), (rank + 1.14, 0.34), COLOURS[rank], bend=-0.75)
    axes.text(
        0.04, 1.0, "halo: w − 1 keys and values of\nlocal heads, to the next rank", fontsize=8, va="bottom"
    )
    for lender, borrower in sorted({block[:2] for block in plan_context(RANKS, LENGTH).blocks}):
        _arrow(axes, (lender + 0.5, 0.36), (borrower + 0.5, 0.36), COLOURS[lender], bend=0.36, style="<|-|>",
               dashed=True)  # fmt: skip
    lent = "lent: queries of global heads,\nand outputs, which come back"
    axes.text(RANKS - 0.04, 1.0, lent, ha="right", fontsize=8, va="bottom")
    axes.add_patch(Rectangle((0.04, -0.62), RANKS - 0.08, 0.16, facecolor="#e9e9e9", edgecolor=FAINT))
    axes.text(RANKS / 2, -0.54, "gather: keys and values of the few global heads, to all ranks", ha="center",
              va="center", fontsize=8.5)  # fmt: skip
    for rank in range(RANKS):
        _arrow(axes, (rank + 0.5, 0), (rank + 0.5, -0.46), COLOURS[rank], style="<|-|>")
    axes.text(0.04, -0.9, "Colours: the rank that holds, or computes.", fontsize=8, color="#555555")


def _arrow(
    axes: Any, start: Any, end: Any, colour: str, bend: float = 0.0, style: str = "-|>", dashed: bool = False
) -> None:
    axes.add_patch(FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=10, color=colour, lw=1.4,
        connectionstyle=f"arc3,rad={bend}", linestyle=(0, (4, 2)) if dashed else "-",
    ))  # fmt: skip


def _draw_mask(axes: Any, title: str, owner: np.ndarray) -> None:
    """Draw which rank computes each visible pair; -1 is hidden."""
    axes.imshow(owner, cmap=ListedColormap(["white", *COLOURS[:RANKS]]), vmin=-1.5, vmax=RANKS - 0.5,
                interpolation="nearest", extent=(0, RANKS, RANKS, 0))  # fmt: skip
    for border in range(1, RANKS):
        axes.axvline(border, color=FAINT, lw=0.8)
        axes.axhline(border, color=FAINT, lw=0.8)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("keys, by the rank that holds them", fontsize=8.5)
    axes.set_ylabel("queries, by the rank that holds them", fontsize=8.5)
    middles = np.arange(RANKS) + 0.5
    axes.set_xticks(middles, [str(rank) for rank in range(RANKS)])
    axes.set_yticks(middles, [str(rank) for rank in range(RANKS)])
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_color(FAINT)


def _local_owner() -> np.ndarray:
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    return np.where((j <= i) & (j > i - WINDOW), i // PART, -1)


def _global_owner() -> np.ndarray:
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    computes = np.arange(LENGTH) // PART
    for block in plan_context(RANKS, LENGTH).blocks:
        computes[block.start : block.end] = block.borrower
    return np.where(j <= i, computes[:, None], -1)


if __name__ == "__main__":
    save_figure(draw(), Path(sys.argv[1]))
