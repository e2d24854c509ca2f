"""Pages: one HTML file each that needs nothing beside it, its pictures included."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from longshort.reporting.files import replace_file
from longshort.reporting.style import PIXEL_RATIO

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        loader=PackageLoader("longshort.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"base64": _base64, "width": _width_on_page}
    return environment.get_template("report.html").render(report=report, version=version("longshort"))


def write_page(report: Report, folder: Path) -> Path:
    """Write FOLDER/report.html; an old one is replaced.

    Raises:
        FileNotFoundError: the file of a figure is missing.
        OSError: the file could not be written.
        ValueError: a figure is no PNG.
    """
    file = folder / REPORT_FILE
    replace_file(file, render_report(report).encode())
    return file


def number(value: float | None) -> str:
    """A measured value to four digits; None is one that was not finite."""
    if value is None or value != value:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode("ascii")


def _width_on_page(file: Path) -> int:
    """In CSS pixels, from the header of the PNG: the page does not jump while it loads."""
    with open(file, "rb") as picture:
        header = picture.read(24)
    if len(header) < 24 or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{file} is no PNG file")
    return struct.unpack(">I", header[16:20])[0] // PIXEL_RATIO
