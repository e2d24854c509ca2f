"""The command `longshort convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from annotated_types import Ge
from rich.table import Table

from longshort.checks import flag
from longshort.cli.flags import parse
from longshort.cli.inspect import print_proposals
from longshort.cli.pretrained import SearchFlags, Show, cut_windows, open_with_text, search_heads
from longshort.conversion.converting import ReportSizes, add_converted, fit_sizes, measure_conversion
from longshort.conversion.journal import Journal, fingerprint, hash_tokens
from longshort.conversion.layout_file import read_layouts
from longshort.conversion.model_card import write_conversion_card
from longshort.conversion.reports import (
    CONVERSION_FILE,
    JOURNAL_FILE,
    finish_conversion,
    loss_rows,
    write_conversion,
)
from longshort.conversion.text import split_held_out
from longshort.evaluation.needle import check_needle
from longshort.evaluation.positions import longest_input
from longshort.huggingface import apply, remove
from longshort.huggingface.loading import Pretrained
from longshort.reporting.console import console, progress_bar
from longshort.reporting.files import require_new_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int64
    from rich.console import Console
    from torch import Tensor

    from longshort.layout import HeadLayout

INSPECTION = "inspection"
"""Folder in OUT with the inspection."""

_SEARCH = (
    "keep", "max_rise", "max_cache", "cache_length", "window", "sink_tokens", "length", "windows", "measure"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(SearchFlags):
    """Write a pretrained decoder with a layout of global and local heads, and a report: losses before and
    after, cache, latency, needles, samples.

    The weights stay as they are. The folder loads with transformers after `import longshort.huggingface`. The
    layout comes from a file, or from an inspection like that of `longshort inspect`. An interrupted command
    resumes when it is called again.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a transformers model and its tokenizer, or its name on the Hugging Face Hub."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the converted model; it must be new or empty."""

    layout: Path | None = None
    """File with the layouts, layout.json of `longshort inspect`. None: inspect the model."""

    no_report: bool = False
    """Only write the model."""

    lengths: tuple[Annotated[int, Ge(2)], ...] = ReportSizes.lengths
    """Lengths of the windows whose losses are compared; those too long for model or text are left out."""

    needle_lengths: tuple[Annotated[int, Ge(1)], ...] = ReportSizes.needle_lengths
    """Lengths of the windows with needles."""

    latency_lengths: tuple[Annotated[int, Ge(1)], ...] = ReportSizes.latency_lengths
    """Tokens in the cache when the time of a token is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _SEARCH if getattr(self, name) != getattr(type(self), name)]
        if self.layout is not None and given:
            flags = ", ".join(map(flag, given))
            raise ValueError(f"--layout is a layout: it does not go with {flags}, of an inspection")


def run(arguments: list[str]) -> int:
    flags = parse(ConvertFlags, "convert", arguments)
    _require_unfinished(flags.out)
    layouts = None if flags.layout is None else read_layouts(flags.layout)
    output = console()
    with progress_bar() as show:
        pretrained, tokens = open_with_text(flags, flags.model, flags.text)
        searched, held_out = split_held_out(tokens)
        sizes = None if flags.no_report else _fit_sizes(flags, pretrained, held_out)
        subject = {"model": fingerprint(pretrained.model), "text": hash_tokens(tokens)}
        parts = []
        if layouts is None:
            parts = cut_windows(flags, pretrained, searched)
        else:
            apply(pretrained.model, layouts)
        with Journal(flags.out / JOURNAL_FILE, subject) as journal:
            if layouts is None:
                found = search_heads(flags, flags.model, pretrained, parts, flags.out / INSPECTION, show)
                print_proposals(output, found, flags.cache_length)
                layouts = found.layouts
                apply(pretrained.model, layouts)
            add_converted(pretrained, flags.out)
            output.print(f"model:  {flags.out}", markup=False)
            if sizes is None:
                write_conversion_card(flags.out, pretrained.model, flags.model, flags.text, None)
                finish_conversion(flags.out, layouts, {"model": flags.model, "text": flags.text})
                return 0
            remove(pretrained.model)
            page = _report(flags, output, pretrained, held_out, layouts, sizes, journal, show)
    output.print(f"report: {page}", markup=False)
    return 0


def _require_unfinished(out: Path) -> None:
    """Raise a FileExistsError unless the folder is new, or has a conversion that was interrupted."""
    if not (out / JOURNAL_FILE).exists() or (out / CONVERSION_FILE).exists():
        require_new_folder(out)


def _fit_sizes(
    flags: ConvertFlags, pretrained: Pretrained, held_out: Int64[Tensor, " tokens"]
) -> ReportSizes:
    """Return what the report measures.

    Raises:
        ValueError: a needle length leaves no room for a needle, the question and text.
    """
    wanted = ReportSizes(
        lengths=flags.lengths, needle_lengths=flags.needle_lengths, latency_lengths=flags.latency_lengths
    )
    sizes = fit_sizes(wanted, len(held_out), longest_input(pretrained.model))
    if sizes.needle_lengths:
        try:
            check_needle(
                pretrained.model,
                pretrained.tokenizer,
                held_out.numpy(),
                lengths=list(sizes.needle_lengths),
                depths=list(sizes.needle_depths),
                samples=sizes.needle_samples,
            )
        except ValueError as error:
            raise ValueError(
                f"--needle-lengths (without a value no needles are measured): {error}"
            ) from error
    return sizes


def _report(
    flags: ConvertFlags,
    output: Console,
    pretrained: Pretrained,
    held_out: Int64[Tensor, " tokens"],
    layouts: Sequence[HeadLayout | None],
    sizes: ReportSizes,
    journal: Journal,
    show: Show,
) -> Path:
    conversion = measure_conversion(
        pretrained,
        layouts,
        held_out,
        sizes,
        journal,
        flags.out,
        progress=lambda done, total: show("measuring", done, total),
    )
    table = Table(box=None)
    for name in ("window", "tokens scored", "loss before", "after", "rise"):
        table.add_column(name, justify="right")
    for row in loss_rows(conversion):
        table.add_row(*row)
    output.print(table)
    write_conversion_card(flags.out, pretrained.model, flags.model, flags.text, conversion)
    about = {"model": flags.model, "text": flags.text}
    return write_conversion(flags.out, conversion, layouts, about)
