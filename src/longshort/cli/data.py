"""The command `longshort data`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.reporting.console import console, progress_bar


@dataclass(frozen=True)
class DataFlags:
    """Turn text into a folder of tokens for training: a training and a validation split, by document, and
    their tokenizer.

    SOURCE is a file, a folder or a glob. A document is a text file, a line of a .jsonl or .ndjson file, or a
    row of a .parquet file; text and lines may be compressed (.gz, .bz2, .xz, .zst). SOURCE may also be
    hf:NAME or hf:NAME:CONFIG, the train split of a dataset of the Hugging Face Hub or of a folder in its
    form, which is streamed (also without hf:, as OWNER/NAME[:CONFIG], where there is no local OWNER); or
    stdlib, the source files of this Python's standard library, which need no download.

    Files that are not text, and records without text, are left out and counted.

    Killed or failed, the same command goes on after the last finished part of 64 MB of text, which lies in a
    hidden folder beside OUT, and writes the same bytes, with any number of processes.
    """

    out: Path
    """Folder to create."""

    source: Annotated[str, tyro.conf.Positional] = "stdlib"
    """Source of the text."""

    tokenizer: str = "bytes"
    """bytes; bpe, trained on a sample of this text; or a folder with a saved Hugging Face tokenizer."""

    vocab_size: Annotated[int, Ge(258)] | None = None
    """Pieces of the bpe tokenizer. None: 10,000."""

    bpe_sample: Annotated[int, Ge(1)] | None = None
    """Megabytes of text, at most, that the bpe tokenizer is trained on: evenly from all files, or the
    beginning of a dataset. None: 256."""

    validation_fraction: float = 0.05
    """Share of the documents for validation."""

    text_field: str = "text"
    """Field of a JSONL record, a parquet file or a dataset that holds the text."""

    strict: bool = False
    """Fail at the first file or record that is not text, or has none, instead of leaving it out."""

    seed: Annotated[int, Ge(0)] = 0
    """Chooses the validation documents."""

    processes: Annotated[int, Ge(1)] = 1
    """Processes that encode text, beside the one that reads and writes. 1: that one encodes too, with a
    thread per core. --tokenizer bytes needs no more."""

    overwrite: bool = False
    """Replace OUT if it is a folder that this command wrote; and begin anew where interrupted work has other
    settings or another source."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"--validation-fraction must lie between 0 and 1, got {self.validation_fraction}"
            )
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise ValueError(f"--vocab-size goes with --tokenizer bpe alone, got {self.tokenizer}")
        if self.bpe_sample is not None and self.tokenizer != "bpe":
            raise ValueError(f"--bpe-sample goes with --tokenizer bpe alone, got {self.tokenizer}")


def run(arguments: list[str]) -> int:
    flags = parse(DataFlags, "data", arguments)
    from longshort.data import prepare

    with _hint_at_interrupted_work(flags.out), progress_bar() as show:
        prepared = prepare(
            flags.source,
            flags.out,
            tokenizer=flags.tokenizer,
            vocab_size=flags.vocab_size or 10_000,
            bpe_sample=(flags.bpe_sample or 256) << 20,
            validation_fraction=flags.validation_fraction,
            text_field=flags.text_field,
            seed=flags.seed,
            processes=flags.processes,
            overwrite=flags.overwrite,
            strict=flags.strict,
            progress=show,
        )
    output = console()
    for name, split in (("training", prepared.train), ("validation", prepared.validation)):
        output.print(
            f"{name:<11}{split.documents:>9,} documents  {split.tokens:>13,} tokens  "
            f"{split.bytes_per_token:.2f} bytes per token"
        )
    if prepared.resumed_tokens:
        output.print(
            f"resumed    {prepared.resumed_tokens:>9,} tokens were there from before an interruption"
        )
    output.print(f"vocabulary {prepared.vocab_size:>9,}")
    output.print(f"left out   {prepared.skipped}")
    for example in prepared.skipped.examples:
        output.print(f"           first: {example}", markup=False)
    output.print(f"written to {prepared.folder}", markup=False)
    return 0


@contextmanager
def _hint_at_interrupted_work(out: Path) -> Iterator[None]:
    """Note on an error, or on Ctrl-C, that the command can go on, if it can."""
    from longshort.data import interrupted_work

    try:
        yield
    except FileExistsError:  # which says itself what to do
        raise
    except BaseException as error:
        if (folder := interrupted_work(out)) is not None:
            error.add_note(f"Finished parts are kept in {folder}; the same command goes on.")
        raise
