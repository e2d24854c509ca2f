"""The command `longshort watch`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from annotated_types import Ge
from rich.table import Table

import longshort.model  # noqa: F401  # lets transformers load longshort's own models
from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.data.tokenization import first_token
from longshort.evaluation import measure_logits
from longshort.evaluation.positions import longest_input
from longshort.huggingface.loading import DTYPES, load_decoder
from longshort.reporting.console import console, progress_bar
from longshort.reporting.files import replace_file, require_new_files, strict_json
from longshort.reporting.heat_map import draw_heat_maps
from longshort.training.parallel import connect

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from longshort.stability import Reading

_NUMBERS, _PICTURE = "logits.json", "logits.png"
_MOST_COLUMNS = 16
_TITLES = ("largest logit", "entropy (nats)", "largest row range")


@dataclass(frozen=True)
class WatchFlags:
    """Measure the attention logits of a Hugging Face decoder on a text, by layer and head.

    A logit is scale·q·k, before softcap; the largest counts by its size. The entropy is the mean over all
    rows of attention. The range of a row is its largest minus its smallest logit; softmax depends on
    differences alone.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model that transformers loads, or its id on the Hugging Face Hub."""

    text: Path
    """Text file, UTF-8."""

    out: Path | None = None
    """Folder for logits.json and logits.png, which must not exist there. None: print the table only."""

    context: Annotated[int, Ge(2)] | None = None
    """Tokens per window. None: 1024, or fewer if the model has no more positions."""

    max_tokens: Annotated[int, Ge(1)] | None = 16384
    """Tokens of the text to read, from its beginning."""

    batch_size: Annotated[int, Ge(1)] = 1
    """Windows per forward pass."""

    attention: str | None = None
    """Attention implementation of transformers, such as eager or sdpa. None: the model's default."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights. auto: as they were saved."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(WatchFlags, "watch", arguments)
    if flags.out is not None:
        require_new_files(flags.out / _NUMBERS, flags.out / _PICTURE)
    text = _read(flags.text)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        model, tokenizer, _ = load_decoder(
            flags.model, dtype=DTYPES.get(flags.dtype), attention=flags.attention, device=ranks.device
        )
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"--text {flags.text} must hold text that the model's tokenizer knows, got none")
    read = torch.tensor(ids[: flags.max_tokens])
    context = _context(flags.context, model)
    with progress_bar() as show:
        reading, names = measure_logits(
            model,
            read,
            context_length=context,
            first_token=first_token(tokenizer),
            batch_size=flags.batch_size,
            progress=lambda done, total: show("watching", done, total),
        )
    output = console()
    output.print(
        f"{type(model).__name__} with {model.config._attn_implementation} attention on {len(read):,} of "
        f"{len(ids):,} tokens, in windows of {context:,}",
        markup=False,
    )
    _print(output, reading, names)
    if flags.out is not None:
        _write(flags.out, reading, names, flags, len(read), context)
        output.print(f"numbers: {flags.out / _NUMBERS}\npicture: {flags.out / _PICTURE}", markup=False)
    return 0


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file} must be UTF-8, got bytes that are not: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"--text {file} must hold text, got an empty file")
    return text


def _context(wanted: int | None, model: PreTrainedModel) -> int:
    limit = longest_input(model)
    if wanted is None:
        return min(1024, limit or 1024)
    if limit is not None and wanted > limit:
        raise ValueError(f"--context must be at most {limit}, the model's positions, got {wanted}")
    return wanted


def _print(output: Console, reading: Reading, names: list[str]) -> None:
    assert reading.row_range_by_head is not None
    most = max(len(heads) for heads in reading.max_logit_by_head)
    columns = range(most if most <= _MOST_COLUMNS else 0)
    table = Table(box=None)
    for name in ("layer", "largest", "head", "median", "entropy", "range", *(f"h{head}" for head in columns)):
        table.add_column(name, justify="right")
    rows = zip(reading.max_logit_by_head, reading.entropy_by_head, reading.row_range_by_head, strict=True)
    for layer, (logits, entropies, ranges) in enumerate(rows):
        head = _highest(logits)
        cells = (logits[head], median(logits), min(entropies), max(ranges))
        largest, middle, entropy, row_range = (f"{value:.3g}" for value in cells)
        by_head = [f"{logit:.3g}" for logit in logits[: len(columns)]]
        table.add_row(str(layer), largest, str(head), middle, entropy, row_range, *by_head)
    output.print(table)
    layer = _highest([max(logits) for logits in reading.max_logit_by_head])
    head = _highest(reading.max_logit_by_head[layer])
    output.print(
        f"largest logit: {reading.max_logit:.4g}, head {head} of layer {layer} ({names[layer]}); by layer: "
        "largest "
        "and median logit of a head, smallest entropy, largest row range",
        markup=False,
    )


def _highest(values: list[float]) -> int:
    """Return the index of the largest value; NaN counts as larger than any."""
    return max(range(len(values)), key=lambda at: math.inf if math.isnan(values[at]) else values[at])


def _write(
    folder: Path, reading: Reading, names: list[str], flags: WatchFlags, tokens: int, context: int
) -> None:
    assert reading.row_range_by_head is not None
    content = {
        "model": flags.model,
        "text": str(flags.text.absolute()),
        "tokens": tokens,
        "context": context,
        "layers": names,
        **reading.as_metrics(),
    }
    replace_file(folder / _NUMBERS, strict_json(content).encode())
    by_head = (reading.max_logit_by_head, reading.entropy_by_head, reading.row_range_by_head)
    draw_heat_maps(
        dict(zip(_TITLES, by_head, strict=True)), folder / _PICTURE, logarithmic=(_TITLES[0], _TITLES[2])
    )
