"""Preparation of a data folder: train.bin, train.json, validation.bin, validation.json and tokenizer/.

One pass over the corpus, for BPE after the training of the tokenizer on a sample. One process reads and
writes, and others may encode; memory holds a few portions for each, of about a megabyte of text or one
document.

Everything is written into a hidden folder beside `out`, which is renamed at the end. After every part, 64 MB
of text, all that is finished is put on the disk, so that a preparation that was killed goes on there. What is
written depends neither on where that is, nor on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from longshort.data.corpora import open_corpus
from longshort.data.corpus import Corpus, Document, Skipped
from longshort.data.files import sync_tree
from longshort.data.processes import EncodingProcesses
from longshort.data.splitting import Splitter
from longshort.data.token_files import SPLITS, TOKENIZER, TokenFileWriter
from longshort.data.tokenization import (
    SMALLEST_BPE_VOCABULARY,
    Encoder,
    byte_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from longshort.data.workspace import Workspace, check_out, interrupted_work, open_workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BPE_SAMPLE = 256 << 20
"""Bytes of text that a BPE tokenizer is trained on, unless told otherwise."""
_PORTION_CHARACTERS = 1 << 20
_PORTION_DOCUMENTS = 1024
_PART_CHARACTERS = 1 << 26
_NOTHING = {"documents": 0, "tokens": 0, "text_bytes": 0}


class Progress(Protocol):
    """A callback for the progress of a preparation, called after every batch of documents."""

    def __call__(self, stage: str, done: int, total: int | None, /) -> None:
        """Report that `done` of `total` bytes (None: not known) are read.

        Stages are "training the tokenizer" and "writing tokens".
        """


@dataclass(frozen=True)
class PreparedSplit:
    documents: int
    tokens: int
    """Tokens, end-of-text tokens included."""
    bytes: int
    """Bytes of the texts in UTF-8."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, and the files and records of the source that were left out."""

    folder: Path
    train: PreparedSplit
    validation: PreparedSplit
    skipped: Skipped
    vocab_size: int
    resumed_tokens: int = 0
    """Tokens that an interrupted preparation had written before."""


@dataclass
class _Portion:
    """Documents that are encoded together."""

    documents: list[tuple[Document, str]] = field(default_factory=list)
    characters: int = 0
    position: int = 0
    """That of the corpus after it."""
    reading: dict[str, Any] | None = None
    """At the end of a part: where reading goes on after it."""

    @property
    def texts(self) -> list[str]:
        return [document.text for document, _ in self.documents]


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bytes",
    vocab_size: int = 10_000,
    bpe_sample: int = BPE_SAMPLE,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    seed: int = 0,
    processes: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenize a corpus into a data folder that `DataFolder.open` reads.

    If it was killed, or failed, after it had finished a part (64 MB of text), the same call goes on there,
    and writes the same bytes as one that was not. What has been read may not have changed since.

    Args:
        source: see `open_corpus`.
        out: the folder to make; it must not be inside a source folder.
        tokenizer: "bytes"; "bpe", trained on this corpus' training documents; or a folder with a saved
            Hugging Face tokenizer.
        vocab_size: pieces of a BPE tokenizer; not used for the others.
        bpe_sample: bytes of text that a BPE tokenizer is trained on, at most; see `Corpus.sample`.
        validation_fraction: probability, between 0 and 1, that a document is used for validation. The choice
            depends on the seed and the document's name alone, and each split gets at least one document.
        text_field: the field that holds the text in JSONL records, parquet files and datasets.
        seed: chooses the validation documents.
        processes: 1: this process encodes, with a thread per core; more: so many others do, with one thread
            each, while this one reads and writes. "bytes" needs none. What is written is the same.
        overwrite: replace `out` if it is a data folder; the old one goes only after the new one is complete.
            Also: begin anew where an interrupted preparation had other settings or its source has changed.
        strict: fail at the first file or record that is not text, or has none; otherwise these are left out,
            and `Prepared.skipped` counts them.
        progress: called after every batch of documents.

    Raises:
        ChildProcessError: a process that encodes has died.
        FileExistsError: `out` is not empty and `overwrite` is not set, or it is not a data folder, or
            another process is preparing it, or an interrupted preparation cannot go on so.
        FileNotFoundError: there is no such source or tokenizer folder.
        ModuleNotFoundError: a package is missing that one of the source's files needs.
        ValueError: an argument is not usable, a part of the corpus cannot be read (see `Corpus.__iter__`), or
            there are fewer than two documents.
    """
    if not isinstance(validation_fraction, int | float) or not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction must be between 0 and 1, both excluded, got {validation_fraction!r}"
        )
    for name, number in (("vocab_size", vocab_size), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{name} must be an integer, got {number!r}")
    for name, number in (("processes", processes), ("bpe_sample", bpe_sample)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {number!r}")
    if tokenizer == "bpe" and vocab_size < SMALLEST_BPE_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_BPE_VOCABULARY} for BPE, got {vocab_size}")
    for name, path in (("source", source), ("out", out), ("tokenizer", tokenizer)):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"{name} must be a string or a path, got {path!r}")
    out = Path(out)
    if interrupted_work(out) is None:
        check_out(out, overwrite)
    ready = None
    if tokenizer not in ("bytes", "bpe"):
        if not Path(tokenizer).is_dir():
            raise FileNotFoundError(
                f"tokenizer must be 'bytes', 'bpe' or a saved tokenizer's folder, got {tokenizer!r}"
            )
        ready = load_tokenizer(tokenizer)
    corpus = open_corpus(source, text_field, strict=strict)
    folder = os.fspath(source).removeprefix("hf:")
    if source != "stdlib" and folder and os.path.isdir(folder) and _is_inside(out, folder):
        raise ValueError(
            f"out {str(out)!r} is inside the source folder, and would be part of the corpus next time"
        )
    settings = {
        "source": corpus.source,
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "strict": strict,
        "tokenizer": str(tokenizer) if ready is None else tokenizer_hash(tokenizer),
    }
    if tokenizer == "bpe":
        settings |= {"vocab_size": vocab_size, "bpe_sample": bpe_sample}
    with open_workspace(out, overwrite, settings) as work:
        if not work.is_renamed:
            _go_on_or_begin(work, corpus, out, overwrite)
            preparation = _Preparation(corpus, validation_fraction, seed, work, progress)
            if work.progress is not None:
                ready = load_tokenizer(work.new / TOKENIZER)
            elif tokenizer == "bytes":
                ready = preparation.save(byte_tokenizer())
            elif tokenizer == "bpe":
                ready = preparation.save(preparation.train_bpe(vocab_size, bpe_sample))
            else:
                assert ready is not None
                preparation.save(ready)
            work.complete(preparation.write(ready, processes))
        assert work.result is not None
        result = work.result
    train, validation = (PreparedSplit(**result[split]) for split in SPLITS)
    skipped = Skipped(**result["skipped"])
    return Prepared(out, train, validation, skipped, result["vocab_size"], result["resumed_tokens"])


def _is_inside(path: Path, folder: str) -> bool:
    return path.resolve().is_relative_to(Path(folder).resolve())


def _go_on_or_begin(work: Workspace, corpus: Corpus, out: Path, overwrite: bool) -> None:
    reading = work.progress and work.progress["reading"]
    changed = corpus.changed_since(reading["corpus"]) if reading else None
    if changed is None:
        return
    if not overwrite:
        raise FileExistsError(
            f"out {str(out)!r}: an interrupted preparation cannot go on, since its source "
            f"{corpus.source!r} has changed: {changed}; overwrite starts anew (--overwrite)"
        )
    work.clear()
    work.new.mkdir(parents=True)


class _Preparation:
    """The steps of a preparation in its workspace."""

    def __init__(
        self,
        corpus: Corpus,
        validation_fraction: float,
        seed: int,
        work: Workspace,
        progress: Progress | None,
    ) -> None:
        self._corpus = corpus
        self._validation_fraction = validation_fraction
        self._seed = seed
        self._work = work
        self._progress = progress

    def train_bpe(self, vocab_size: int, sample: int) -> PreTrainedTokenizerFast:
        splitter = Splitter(self._validation_fraction, self._seed)

        def training() -> Iterator[list[str]]:
            for portion in self._portions(self._corpus.sample(sample), splitter):
                yield [document.text for document, split in portion.documents if split == "train"]
                self._report("training the tokenizer", portion)

        return train_bpe(training(), vocab_size)

    def save(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        folder = self._work.new / TOKENIZER
        tokenizer.save_pretrained(folder)
        if self._corpus.position >= _PART_CHARACTERS:  # it was trained on so much that it is worth keeping
            sync_tree(self._work.new)
            self._work.keep({"reading": None})
        return tokenizer

    def write(self, tokenizer: PreTrainedTokenizerFast, processes: int) -> dict[str, Any]:
        """Write both splits, from where an interrupted preparation stood; return the result, as JSON."""
        reading = self._work.progress and self._work.progress["reading"]
        splitter = Splitter(self._validation_fraction, self._seed, reading and reading["splitter"])
        documents = self._corpus.read(reading and reading["corpus"])
        portions = self._portions(documents, splitter)
        end_of_text = np.array([tokenizer.eos_token_id], dtype=np.uint32)
        vocab_size = vocabulary_size(tokenizer)
        encoder = Encoder(tokenizer)
        with ExitStack() as stack:
            writers = self._writers(stack, vocab_size)
            resumed = sum(writer.tokens for writer in writers.values())
            if processes == 1 or encoder.is_bytes:
                encoded = ((portion, encoder.encode(portion.texts)) for portion in portions)
            else:
                encoded = stack.enter_context(EncodingProcesses(encoder, processes)).encode(portions)
            for portion, ids in encoded:
                for (document, split), document_ids in zip(portion.documents, ids, strict=True):
                    with_end = np.concatenate((document_ids, end_of_text))
                    writers[split].add(with_end, len(document.text.encode()))
                if portion.reading is not None:
                    committed = {split: writer.commit() for split, writer in writers.items()}
                    sync_tree(self._work.new / TOKENIZER)
                    self._work.keep({"reading": portion.reading, "committed": committed})
                self._report("writing tokens", portion)
            if splitter.documents < 2:
                skipped = self._corpus.skipped
                left_out = "; ".join([str(skipped), *skipped.examples])
                raise ValueError(
                    f"source {self._corpus.source!r} has {splitter.documents} documents "
                    f"(left out: {left_out}); a training and a validation split need at least 2"
                )
        splits = {
            split: {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.text_bytes}
            for split, writer in writers.items()
        }
        skipped = asdict(self._corpus.skipped)
        return splits | {"skipped": skipped, "vocab_size": vocab_size, "resumed_tokens": resumed}

    def _writers(self, stack: ExitStack, vocab_size: int) -> dict[str, TokenFileWriter]:
        work = self._work
        committed = (work.progress or {}).get("committed", {})
        digest = tokenizer_hash(work.new / TOKENIZER)
        return {
            split: stack.enter_context(
                TokenFileWriter(
                    work.new / split,
                    vocab_size,
                    digest,
                    self._corpus.source,
                    journal=work.folder / f"{split}.documents",
                    committed=committed.get(split, _NOTHING if work.progress else None),
                )
            )
            for split in SPLITS
        }

    def _portions(self, documents: Iterable[Document], splitter: Splitter) -> Iterator[_Portion]:
        """Yield documents in portions of about a megabyte; the last of a part notes where reading stands."""
        portion, since_part = _Portion(), 0
        for document in documents:
            assigned = splitter.add(document)
            portion.documents += assigned
            portion.characters += sum(len(document.text) for document, _ in assigned)
            if portion.characters >= _PORTION_CHARACTERS or len(portion.documents) >= _PORTION_DOCUMENTS:
                portion.position = self._corpus.position
                since_part += portion.characters
                if since_part >= _PART_CHARACTERS:
                    portion.reading = {"corpus": self._corpus.state, "splitter": splitter.state}
                    since_part = 0
                yield portion
                portion = _Portion()
        portion.documents += splitter.finish()
        if portion.documents:
            portion.position = self._corpus.position
            yield portion

    def _report(self, stage: str, portion: _Portion) -> None:
        if self._progress is not None:
            self._progress(stage, portion.position, self._corpus.size)
