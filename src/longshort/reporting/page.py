"""Pages: self-contained HTML files that include their figures."""

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
    """A table of cells as they are shown. The first cell of a row is its name.

    Attributes:
        header: the names of the columns.
        rows: the cells of each row.
        is_text: whether cells are sentences, which wrap, rather than numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Figure:
    """A PNG file, which is included in the report, and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote, and its prompt."""

    label: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Card:
    """A statement and its outcome.

    Attributes:
        title: name of the statement.
        badge: the outcome in a word or two.
        tone: "good", "mixed", "bad" or "neutral"; the colour of the badge.
        text: the statement.
        rows: names and texts, such as ("measured", "…").
    """

    title: str
    badge: str
    tone: str
    text: str
    rows: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """A section of a page: paragraphs, then cards, a table, figures and samples, all optional."""

    heading: str = ""
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()
    samples: Sequence[Sample] = ()
    cards: Sequence[Card] = ()


@dataclass(frozen=True)
class Report:
    """A page. All its text is plain: markup in it is shown, not interpreted."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)


def render_report(report: Report) -> str:
    """Render a page as HTML.

    Raises:
        FileNotFoundError: the file of a figure is missing.
        ValueError: a figure is not a PNG.
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
        ValueError: a figure is not a PNG.
    """
    file = folder / REPORT_FILE
    replace_file(file, render_report(report).encode())
    return file


def number(value: float | None) -> str:
    """Format a measured value with four digits; None is one that was not finite."""
    if value is None or value != value:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode("ascii")


def _width_on_page(file: Path) -> int:
    """Read the width in CSS pixels from the header of a PNG; with it, a page does not shift as it loads."""
    with open(file, "rb") as picture:
        header = picture.read(24)
    if len(header) < 24 or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{file} is not a PNG file")
    return struct.unpack(">I", header[16:20])[0] // PIXEL_RATIO
