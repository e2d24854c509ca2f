"""The report of one training run, from its metrics alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from longshort.reporting.page import Figure, Report, Section, Table, number, write_page
from longshort.training.metrics import has_values, read_metrics
from longshort.training.plots import plot_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def write_report(run: str | Path) -> Path:
    """Draw the plots of a run anew and writes RUN/report.html, all from RUN/metrics.jsonl alone.

    Raises:
        FileNotFoundError: there is no metrics.jsonl in the run folder.
        ValueError: metrics.jsonl has no line yet.
    """
    run = Path(run)
    pictures = plot_run(run)
    metrics = read_metrics(run)
    last = metrics[-1]
    page = Report(
        title=run.resolve().name,
        subtitle=f"Training run, {last['step']:,} steps, {last['tokens']:,} tokens",
        sections=[
            Section(table=Table(("measure", "value", "at step"), summarize(metrics))),
            *(
                Section(heading, figures=[Figure(picture, caption)])
                for picture in pictures
                for heading, caption in [_CAPTIONS[picture.stem]]
            ),
        ],
    )
    return write_page(page, run)


_CAPTIONS = {
    "loss": (
        "Loss",
        "Training loss of each logged step, faint, and its running mean; dots are the validation loss.",
    ),
    "logits": (
        "Attention logits",
        (
            "The largest absolute logit before softcap and ALiBi, by group of heads. Inside the local "
            "window, global heads are compared with local heads over equal sets of pairs."
        ),
    ),
    "entropy": (
        "Entropy",
        (
            "How widely each head spreads its attention: the mean entropy over its rows, 0 where each "
            "attends to one key alone."
        ),
    ),
    "heads": ("Heads at the end", "The largest absolute logit of each head at the last monitored step."),
}


def summarize(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return rows of name, value and step: last and best losses, last logits, speed."""
    rows = []
    for name, key in (("training loss", "loss"), ("validation loss", "validation_loss")):
        line = _last(metrics, key)
        if line is not None:
            rows.append((f"{name} (nats per token)", number(line[key]), f"{line['step']:,}"))
    best = min(
        (line for line in metrics if line.get("validation_loss") is not None),
        key=lambda line: line["validation_loss"],
        default=None,
    )
    if best is not None:
        rows.append(
            ("best validation loss (nats per token)", number(best["validation_loss"]), f"{best['step']:,}")
        )
    for name, key in (
        ("largest logit", "max_logit"),
        ("largest logit, local heads", "max_logit_local"),
        ("largest logit, global heads", "max_logit_global"),
        ("largest logit, global heads inside the local window", "max_logit_global_in_band"),
    ):
        line = _last(metrics, key)
        has_such_heads = key == "max_logit" or has_values(metrics, key)
        if line is not None and has_such_heads:
            rows.append((name, number(line[key]), f"{line['step']:,}"))
    speeds = [line["tokens_per_second"] for line in metrics if line.get("tokens_per_second") is not None]
    if speeds:
        rows.append(("tokens per second (median)", f"{median(speeds):,.0f}", ""))
    return rows


def _last(metrics: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return next((line for line in reversed(metrics) if key in line), None)
