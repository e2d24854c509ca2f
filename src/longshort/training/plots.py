"""Pictures of training runs, drawn from metrics.jsonl alone, and of evaluations.

Losses are in nats per token, logits are absolute values before softcap and ALiBi. A value that is not finite
is left out of a line, and the first such loss is marked: a run that diverged shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longshort.reporting.style import (
    COLOURS,
    INK,
    label_log_axis,
    new_figure,
    plain_number,
    save_figure,
    scale_logarithmically,
)
from longshort.training.metrics import has_values, read_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from longshort.evaluation import Evaluation

    Metrics = Sequence[Mapping[str, Any]]

_MAPS = {"logit": "viridis", "entropy": "cividis"}
_CELLS_WITH_NUMBERS = 160


def plot_run(run: str | Path) -> list[Path]:
    """Draw RUN/plots/{loss,logits,entropy,heads}.png from RUN/metrics.jsonl; old ones are replaced.

    The last three need statistics of the attention heads, which a run with `monitor_every=0` lacks.

    Returns:
        The files that were written, in that order.

    Raises:
        FileNotFoundError: there is no metrics.jsonl in the run folder.
        ValueError: metrics.jsonl has no line yet.
    """
    run = Path(run)
    metrics = _read(run)
    figures = {"loss": _loss({"training": metrics})}
    if _has(metrics, "max_logit"):
        figures["logits"] = _logits_by_group(metrics)
    if _has(metrics, "entropy_by_head"):
        figures["entropy"] = _entropy(metrics)
    if _has(metrics, "max_logit_by_head"):
        figures["heads"] = _heads({"": metrics})
    return _save_all(figures, run / "plots")


def compare_runs(runs: Mapping[str, str | Path], out: str | Path) -> list[Path]:
    """Draw all runs in one picture each: loss.png, logits.png, heads.png, from their metrics.jsonl.

    Args:
        runs: run folders by the name that the legend shows.
        out: folder for the pictures; old ones are replaced.

    Returns:
        The files that were written; logits and heads only where every run has those statistics.

    Raises:
        FileNotFoundError: a run has no metrics.jsonl.
        ValueError: `runs` is empty, or one has no line yet.
    """
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    by_name = {name: _read(Path(run)) for name, run in runs.items()}
    figures = {"loss": _loss(by_name)}
    if all(_has(metrics, "max_logit") for metrics in by_name.values()):
        figures["logits"] = _logits_by_run(by_name)
    if all(_has(metrics, "max_logit_by_head") for metrics in by_name.values()):
        figures["heads"] = _heads(by_name)
    return _save_all(figures, Path(out))


def plot_loss_by_position(evaluations: Mapping[str, Evaluation], file: str | Path) -> Path:
    """Draw the mean loss at each position in the context, one line per evaluation.

    Raises:
        ValueError: `evaluations` is empty.
    """
    if not evaluations:
        raise ValueError("evaluations must hold at least one evaluation, got none")
    figure, axes = new_figure("Loss by position in the context", "tokens of context", "loss (nats per token)")
    for colour, (name, evaluation) in zip(_colours(len(evaluations)), evaluations.items(), strict=True):
        bins = evaluation.loss_by_position
        middles = [(position.first + position.last) / 2 + 1 for position in bins]
        axes.plot(middles, [position.loss for position in bins], "o-", ms=3.5, color=colour, label=name)
        axes.axhline(evaluation.loss, color=colour, lw=1, ls=":")
    axes.set_xlim(0.9, 1.1 * max(evaluation.context_length for evaluation in evaluations.values()))
    axes.set_xscale("log", base=2)  # with its own ticks
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    _legend(axes, extra_line=("mean over all tokens", ":"))
    file = Path(file)
    save_figure(figure, file)
    return file


def _loss(by_name: Mapping[str, Metrics]) -> Figure:
    figure, axes = new_figure("Loss", "step", "loss (nats per token)")
    validated = False
    for colour, (name, metrics) in zip(_colours(len(by_name)), by_name.items(), strict=True):
        steps, losses = _series(metrics, "loss")
        axes.plot(steps, losses, color=colour, lw=0.8, alpha=0.35)
        axes.plot(steps, _running_mean(losses), color=colour, lw=1.8, label=name)
        steps, losses = _series(metrics, "validation_loss")
        if len(steps):
            validated = True
            axes.plot(steps, losses, "o", color=colour, ms=5, mec="white", mew=0.8)
        _mark_divergence(axes, metrics, colour)
    scale_logarithmically(axes)
    _legend(axes, extra_marker="validation" if validated else None)
    return figure


def _logits_by_group(metrics: Metrics) -> Figure:
    figure, axes = new_figure("Largest attention logit", "step", "largest |scale · q·k|")
    groups = (
        ("max_logit_global", "global heads", "-"),
        ("max_logit_global_in_band", "global heads, inside the local window", "--"),
        ("max_logit_local", "local heads", "-"),
    )
    colours = (COLOURS[1], COLOURS[1], COLOURS[0])
    for (key, label, style), colour in zip(groups, colours, strict=True):
        steps, values = _series(metrics, key)
        if has_values(metrics, key):
            axes.plot(steps, values, style, color=colour, lw=1.8, label=label)
    scale_logarithmically(axes)
    _legend(axes)
    return figure


def _logits_by_run(by_name: Mapping[str, Metrics]) -> Figure:
    figure, axes = new_figure("Largest attention logit", "step", "largest |scale · q·k|")
    banded = False
    for colour, (name, metrics) in zip(_colours(len(by_name)), by_name.items(), strict=True):
        axes.plot(*_series(metrics, "max_logit"), color=colour, lw=1.8, label=name)
        steps, values = _series(metrics, "max_logit_global_in_band")
        if has_values(metrics, "max_logit_global_in_band"):
            banded = True
            axes.plot(steps, values, "--", color=colour, lw=1.2)
    scale_logarithmically(axes)
    _legend(axes, extra_line=("global heads, inside the local window", "--") if banded else None)
    return figure


def _entropy(metrics: Metrics) -> Figure:
    steps, by_head = _series(metrics, "entropy_by_head")
    layers, heads = by_head.shape[1:]
    rows = by_head.reshape(len(steps), layers * heads).T
    figure, axes = new_figure(
        "Entropy of the attention probabilities", "step", "head", height=max(3.6, min(9.0, 0.3 * len(rows)))
    )
    axes.grid(visible=False)
    edges = np.concatenate(
        [steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:] + (1 if len(steps) == 1 else 0)]
    )
    mesh = axes.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, rows, cmap=_MAPS["entropy"], vmin=0)
    axes.invert_yaxis()
    if len(rows) <= 48:
        axes.set_yticks(
            range(len(rows)), [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        )
        axes.set_ylabel("layer.head")
    else:
        axes.set_yticks([(layer + 0.5) * heads - 0.5 for layer in range(layers)], map(str, range(layers)))
        axes.set_ylabel(f"layer ({heads} heads each)")
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", lw=2)
    figure.colorbar(mesh, ax=axes, label="entropy (nats)", pad=0.02)
    return figure


def _heads(by_name: Mapping[str, Metrics]) -> Figure:
    """Draw the largest logit by layer and head at the last step that measured it, on one colour scale."""
    steps, values = [], []
    for metrics in by_name.values():
        at, by_head = _series(metrics, "max_logit_by_head")
        steps.append(int(at[-1]))
        values.append(by_head[-1])
    layers, heads = values[0].shape
    cell = 0.62 if layers * heads <= _CELLS_WITH_NUMBERS else 0.3
    figure = Figure(
        figsize=(len(values) * max(3.2, cell * heads + 0.9) + 0.9, max(2.4, cell * layers + 1.4)),
        layout="constrained",
    )
    figure.suptitle("Largest attention logit of each head", x=0.01, ha="left", fontsize=12, fontweight="bold")
    norm = _log_norm(np.concatenate([table.ravel() for table in values]))
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    image = None
    for axes, name, step, table in zip(panels, by_name, steps, values, strict=True):
        image = axes.imshow(table, cmap=_MAPS["logit"], norm=norm, aspect="auto")
        axes.set_title(f"{name}, step {step}" if name else f"step {step}", fontsize=10)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[:].set_visible(False)
        if table.size <= _CELLS_WITH_NUMBERS:
            for (layer, head), value in np.ndenumerate(table):
                dark = norm(value) < 0.55 if np.isfinite(value) else False
                axes.text(
                    head, layer, _short(value), ha="center", va="center", fontsize=9,
                    color="white" if dark else INK,
                )  # fmt: skip
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), label="largest |scale · q·k|", pad=0.02)
    if isinstance(norm, LogNorm):
        label_log_axis(bar.ax.yaxis)
    return figure


def _read(run: Path) -> Metrics:
    metrics = read_metrics(run)
    if not metrics:
        raise ValueError(f"nothing to draw: {run / 'metrics.jsonl'} has no line yet")
    return metrics


def _has(metrics: Metrics, key: str) -> bool:
    return any(key in line for line in metrics)


def _series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (n,) and values (n,) or (n, layers, heads) of lines that have `key`; None becomes NaN."""
    measured = [line for line in metrics if key in line]
    steps = np.array([line["step"] for line in measured], dtype=np.float64)
    return steps, np.array([line[key] for line in measured], dtype=np.float64)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over about a fiftieth of the points, so that a spike stays one; keeps NaN."""
    half = len(values) // 100
    if half == 0:
        return values
    known = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _mark_divergence(axes: Axes, metrics: Metrics, colour: str) -> None:
    first = next((line for line in metrics if "loss" in line and line["loss"] is None), None)
    if first is not None:
        axes.axvline(first["step"], color=colour, lw=1, ls="--")
        axes.annotate(
            f"not finite from step {first['step']}", (first["step"], 0.98),
            xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points",
            rotation=90, ha="right", va="top", color=colour, fontsize=8,
        )  # fmt: skip


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _log_norm(values: np.ndarray) -> Normalize:
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) == 0:
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max())
    return LogNorm(low, max(high, low * 1.01))


def _legend(axes: Axes, extra_marker: str | None = None, extra_line: tuple[str, str] | None = None) -> None:
    """Add a legend of the lines; the meaning of a marker or dash is explained once, in grey."""
    if extra_marker:
        axes.plot([], [], "o", color="#777777", ms=5, label=extra_marker)
    if extra_line:
        axes.plot([], [], extra_line[1], color="#777777", lw=1.2, label=extra_line[0])
    axes.legend(frameon=False, fontsize=9)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in figures]
    for figure, file in zip(figures.values(), files, strict=True):
        save_figure(figure, file)
    return files
