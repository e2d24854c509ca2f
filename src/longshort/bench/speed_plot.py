"""A picture of the rows of `measure_attention`, and how every benchmark draws numbers by length."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from longshort.bench.attention_providers import BASELINE, PROVIDERS
from longshort.bench.benchmarking import partial_name
from longshort.bench.speed_settings import count_threads, describe_layout
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from longshort.bench.attention_speed import Row

# Okabe and Ito's colours, which stay apart for colour-blind readers; the baseline is grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _GREY, _FAINT = "#222222", "#777777", "#c8c8c8"
_SMALLEST_RANGE = 5.0  # of an axis of times, highest to lowest, so that two ticks at least have a number
_OTHERS = tuple(name for name in PROVIDERS if name != BASELINE)


def plot_speed(rows: Sequence[Row], file: Path) -> None:
    """Draws milliseconds by length as a PNG; bars reach from the 10th to the 90th percentile.

    A line is a provider, a column of panels a pass, a row of panels a layout, dtype and number of threads. An
    old file is replaced.

    Raises:
        ValueError: there are no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    passes = list(dict.fromkeys(row.pass_name for row in rows))
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    size = (max(6.5, 0.5 + 3.9 * len(passes)), 1.1 + 3.0 * len(settings))
    figure = Figure(figsize=size, layout="constrained", dpi=200)
    panels = figure.subplots(len(settings), len(passes), squeeze=False)
    handles = {}
    for line, setting in zip(panels, settings, strict=True):
        for axes, pass_name in zip(line, passes, strict=True):
            shown = [row for row in rows if (row.pass_name, _setting(row)) == (pass_name, setting)]
            _draw(axes, shown)
            # the setting runs on over the panels beside, whose titles have one line
            title = pass_name if axes is not line[0] else f"{setting}\n{pass_name}"
            axes.set_title(title, loc="left", fontsize=9, color=_INK)
            handles |= {text: mark for mark, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        line[0].set_ylabel("milliseconds")
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    title = f"Time of attention\n{rows[0].processor}, torch {rows[0].torch_version}"
    finish_figure(figure, title, handles, file)


def finish_figure(figure: Figure, title: str, handles: Mapping[str, Any], file: Path) -> None:
    """Adds a title and a legend of marks by name, and writes the figure as a PNG; an old file is replaced."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    partial = partial_name(file)
    partial.write_bytes(picture.getvalue())
    os.replace(partial, file)


def _setting(row: Row) -> str:
    layout = HeadLayout.split(row.heads, row.global_heads, row.window or 1, row.kv_heads)
    clock = "CPU time" if row.threads == 1 else "wall time"
    return f"{describe_layout(layout)}; {row.dtype}, {count_threads(row.threads)}, {clock}"


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    lines = {
        provider: [
            Point(row.length, row.milliseconds, row.milliseconds_p10, row.milliseconds_p90)
            for row in rows
            if row.provider == provider
        ]
        for provider in dict.fromkeys(row.provider for row in rows)
    }
    draw_by_length(axes, lines, _OTHERS, BASELINE)


class Point(NamedTuple):
    """A number at a length, and how far its bar reaches."""

    length: int
    middle: float
    low: float
    high: float


def draw_by_length(
    axes: Axes, lines: Mapping[str, Sequence[Point]], providers: Sequence[str], baseline: str
) -> None:
    """Draws a line by provider on logarithmic axes.

    Args:
        axes: where.
        lines: the points of each provider.
        providers: all that there are but the baseline, so that each keeps its colour in every picture.
        baseline: the provider in grey.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    colours = dict(zip(providers, _COLOURS, strict=False)) | {baseline: _GREY}
    for provider, points in lines.items():
        line = sorted(points)
        spread = (
            [max(0.0, point.middle - point.low) for point in line],
            [max(0.0, point.high - point.middle) for point in line],
        )
        axes.errorbar(
            [point.length for point in line], [point.middle for point in line], spread, fmt="o-", ms=4,
            lw=1.6, elinewidth=1, color=colours.get(provider, _INK), label=provider,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({point.length for points in lines.values() for point in points})
    if lengths:
        axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    low, high = axes.get_ylim()
    widening = max(1.0, (_SMALLEST_RANGE * low / high) ** 0.5)
    axes.set_ylim(low / widening, high * widening)
    plain = FuncFormatter(lambda value, _position: f"{value:,.4g}")
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", color=_FAINT, labelsize=9)
    axes.grid(color=_FAINT, lw=0.5, alpha=0.6)
    axes.set_axisbelow(True)
