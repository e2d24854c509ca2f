"""Pictures of the benchmarks of inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longshort.bench.inference_providers import PROVIDERS
from longshort.bench.speed_plot import draw_by_length, finish_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longshort.bench.inference_results import Row
    from longshort.bench.speed_plot import Point

_BASELINE = "mhsa"
_OTHERS = tuple(name for name in PROVIDERS if name != _BASELINE)


def plot_inference(
    rows: Sequence[Row],
    points: Sequence[Point],
    title: str,
    unit: str,
    file: Path,
    bounds: Sequence[tuple[int, float]] = (),
) -> None:
    """Draws a number by length as a PNG, a line for each provider. An old file is replaced.

    Args:
        rows: at least one.
        points: that of each row.
        title: what is drawn.
        unit: of the points.
        file: the PNG.
        bounds: length and Amdahl's bound of `ls` against `mhsa`, in the same unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.4), layout="constrained", dpi=200)
    axes = figure.subplots()
    lines: dict[str, list[Point]] = {}
    for row, point in zip(rows, points, strict=True):
        lines.setdefault(row.provider, []).append(point)
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "--", color="#777777", lw=1.2, label="Amdahl's bound of ls")
    draw_by_length(axes, lines, _OTHERS, _BASELINE)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    marks, names = axes.get_legend_handles_labels()
    row = rows[0]
    machine = row.accelerator or f"{row.processor}, threads: {row.threads}"
    subtitle = f"{row.preset}, layers: {row.layers}, batch {row.batch}, {row.dtype}\n{machine}"
    finish_figure(figure, f"{title}\n{subtitle}", dict(zip(names, marks, strict=True)), file)
