"""The command `longshort convert`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from longshort.cli.console import console, progress_bar
from longshort.cli.flags import parse
from longshort.cli.inspect import print_proposals
from longshort.cli.pretrained import SearchFlags, Show, open_with_text, search_heads
from longshort.conversion.converting import ReportSizes, fit_sizes, measure_conversion
from longshort.conversion.journal import Journal, fingerprint, hash_tokens
from longshort.conversion.layout_file import read_layouts
from longshort.conversion.models import add_model_files
from longshort.conversion.reports import CONVERSION_FILE, JOURNAL_FILE, loss_rows, write_conversion
from longshort.conversion.text import split_held_out
from longshort.evaluation.positions import longest_input
from longshort.huggingface import apply, remove
from longshort.huggingface.loading import Pretrained
from longshort.reporting.files import require_new_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int64
    from rich.console import Console
    from torch import Tensor

    from longshort.layout import HeadLayout

INSPECTION = "inspection"
"""Folder in OUT with the inspection."""


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

    lengths: tuple[int, ...] = ReportSizes.lengths
    """Lengths of the windows whose losses are compared; those too long for model or text are left out."""

    needle_lengths: tuple[int, ...] = ReportSizes.needle_lengths
    """Lengths of the windows with needles."""

    latency_lengths: tuple[int, ...] = ReportSizes.latency_lengths
    """Tokens in the cache when the time of a token is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout is not None and (self.keep or self.max_rise or self.max_cache):
            raise ValueError("--layout excludes --keep, --max-rise and --max-cache, which choose a layout")


def run(arguments: list[str]) -> int:
    flags = parse(ConvertFlags, "convert", arguments)
    _require_unfinished(flags.out)
    output = console()
    with progress_bar() as show:
        pretrained, held_out, layouts = _layouts(flags, output, show)
        apply(pretrained.model, layouts)
        if not (flags.out / "config.json").exists():
            add_model_files(pretrained, flags.out)
        output.print(f"model:  {flags.out}", markup=False)
        if flags.no_report:
            return 0
        remove(pretrained.model)
        page = _report(flags, output, pretrained, held_out, layouts, show)
    output.print(f"report: {page}", markup=False)
    return 0


def _require_unfinished(out: Path) -> None:
    """Raise a FileExistsError unless the folder is new, or has a conversion that was interrupted."""
    is_begun = (out / JOURNAL_FILE).exists() or (out / INSPECTION).exists()
    if not is_begun or (out / CONVERSION_FILE).exists():
        require_new_folder(out)


def _layouts(
    flags: ConvertFlags, output: Console, show: Show
) -> tuple[Pretrained, Int64[Tensor, " tokens"], Sequence[HeadLayout | None]]:
    """Open the model, and read or find its layouts; also return text that was not used for that."""
    if flags.layout is None:
        pretrained, held_out, found = search_heads(flags, flags.model, flags.out / INSPECTION, show)
        print_proposals(output, found, flags.cache_length)
        return pretrained, held_out, found.layouts
    layouts = read_layouts(flags.layout)  # before the model, which takes longer
    pretrained, tokens = open_with_text(flags, flags.model, flags.text)
    return pretrained, split_held_out(tokens)[1], layouts


def _report(
    flags: ConvertFlags,
    output: Console,
    pretrained: Pretrained,
    held_out: Int64[Tensor, " tokens"],
    layouts: Sequence[HeadLayout | None],
    show: Show,
) -> Path:
    wanted = ReportSizes(
        lengths=flags.lengths, needle_lengths=flags.needle_lengths, latency_lengths=flags.latency_lengths
    )
    limit = longest_input(pretrained.model)
    sizes = fit_sizes(wanted, len(held_out), limit)
    subject = {
        "model": fingerprint(pretrained.model),
        "text": hash_tokens(held_out),
        "layouts": [repr(layout) for layout in layouts],
        "sizes": asdict(sizes),
    }
    with Journal(flags.out / JOURNAL_FILE, subject) as journal:
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
    about = {"model": flags.model, "text": flags.text}
    return write_conversion(flags.out, conversion, layouts, about)
