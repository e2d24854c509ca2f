"""Reports: one HTML file each that needs nothing beside it, its pictures included."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import longshort
from longshort.training.figure_style import PIXEL_RATIO
from longshort.training.files import replace_file
from longshort.training.metrics import has_values, read_metrics
from longshort.training.plots import plot_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first cell of a row names it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A PNG file, which goes into the report, and what it shows."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Sample:
    """Text of a model, after its prompt."""

    label: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Card:
    """A statement and what came out for it.

    Attributes:
        title: names it.
        badge: the outcome in a word or two.
        tone: "good", "mixed", "bad" or "neutral"; the colour of the badge.
        text: the statement.
        rows: names and what is to be said, such as ("measured", "…").
    """

    title: str
    badge: str
    tone: str
    text: str
    rows: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """Paragraphs, then cards, a table, figures and samples, each where there are some."""

    heading: str = ""
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()
    samples: Sequence[Sample] = ()
    cards: Sequence[Card] = ()


@dataclass(frozen=True)
class Report:
    """A page. All its text is plain: markup in it is shown, not obeyed."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)


def render_report(report: Report) -> str:
    """The page as HTML.

    Raises:
        FileNotFoundError: the file of a figure is missing.
        ValueError: it is no PNG.
    """
    environment = Environment(
        loader=PackageLoader("longshort.training"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"base64": _base64, "width": _width_on_page}
    return environment.get_template("report.html").render(report=report, version=longshort.__version__)


def write_report(run: str | Path) -> Path:
    """Draws the plots of a run anew and writes RUN/report.html, all from RUN/metrics.jsonl alone.

    Raises:
        FileNotFoundError: there is no metrics.jsonl in the run folder.
        ValueError: metrics.jsonl has no line yet.
    """
    run = Path(run)
    pictures = plot_run(run)
    metrics = read_metrics(run)
    last = metrics[-1]
    report = Report(
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
    file = run / REPORT_FILE
    replace_file(file, render_report(report).encode())
    return file


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
    """Rows of name, value and step: losses at the end and at their best, logits at the end, speed."""
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


def number(value: float | None) -> str:
    """A measured value to four digits; None is one that was not finite."""
    if value is None or value != value:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _last(metrics: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return next((line for line in reversed(metrics) if key in line), None)


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode("ascii")


def _width_on_page(file: Path) -> int:
    """In CSS pixels, from the header of the PNG: the page does not jump while it loads."""
    with open(file, "rb") as picture:
        header = picture.read(24)
    if len(header) < 24 or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{file} is no PNG file")
    return struct.unpack(">I", header[16:20])[0] // PIXEL_RATIO
