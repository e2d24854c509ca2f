"""The style of all figures: colours, axes, and PNG files at twice the size at which they are shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from longshort.reporting.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which colour-blind readers can tell apart, in an order that prints well in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#c8c8c8"
PIXEL_RATIO = 2  # figures have twice the size at which they are shown


def new_figure(title: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Axes]:
    """Make a figure with one panel."""
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, x, y)
    return figure, axes


def style_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title, the labels with units, and unobtrusive lines."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelsize=9)
    axes.grid(color=FAINT, lw=0.5, alpha=0.6)
    axes.set_axisbelow(True)


def scale_logarithmically(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers, if a line has a value that it can show."""
    if any((np.asarray(line.get_ydata(), dtype=np.float64) > 0).any() for line in axes.get_lines()):
        axes.set_yscale("log")
        label_log_axis(axes.yaxis)


def label_log_axis(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, even within one power of ten."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high > 30 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    if high > 1e5 * low:
        subs = (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: float, _position: int | None = None) -> str:
    """Format a tick's label without powers of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.5g}"


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG; an old file is replaced."""
    picture = io.BytesIO()
    figure.set_dpi(100 * PIXEL_RATIO)
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    replace_file(file, picture.getvalue())
