"""Preparation of a data folder: train.bin, train.json, validation.bin, validation.json and tokenizer/.

One pass over the corpus (two for BPE, whose tokenizer is trained first), with one document in memory beside a
batch of about a megabyte. Everything is written into a hidden folder beside `out` and renamed at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from longshort.data.corpora import Corpus, Document, Skipped, open_corpus
from longshort.data.files import sync_folder, sync_tree
from longshort.data.token_files import SPLITS, TOKENIZER, TokenFileWriter, is_token_description
from longshort.data.tokenization import (
    SMALLEST_BPE_VOCABULARY,
    Encoder,
    byte_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


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


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bytes",
    vocab_size: int = 10_000,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    seed: int = 0,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenize a corpus into a data folder that `DataFolder.open` reads.

    Args:
        source: see `open_corpus`.
        out: the folder to make; it must not be inside a source folder.
        tokenizer: "bytes"; "bpe", trained on this corpus' training documents; or a folder with a saved
            Hugging Face tokenizer.
        vocab_size: pieces of a BPE tokenizer; not used for the others.
        validation_fraction: probability, between 0 and 1, that a document is used for validation. The choice
            depends on the seed and the document's name alone, and each split gets at least one document.
        text_field: the field that holds the text in JSONL records, parquet files and datasets.
        seed: chooses the validation documents.
        overwrite: replace `out` if it is a data folder; the old one goes only after the new one is complete.
        strict: fail at the first file or record that is not text, or has none; otherwise these are left out,
            and `Prepared.skipped` counts them.
        progress: called after every batch of documents.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is not set, or it is not a data folder, or
            another process is preparing it.
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
    if tokenizer == "bpe" and vocab_size < SMALLEST_BPE_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_BPE_VOCABULARY} for BPE, got {vocab_size}")
    for name, path in (("source", source), ("out", out), ("tokenizer", tokenizer)):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"{name} must be a string or a path, got {path!r}")
    out = Path(out)
    _check_out(out, overwrite)
    ready = None
    if tokenizer not in ("bytes", "bpe"):
        if not Path(tokenizer).is_dir():
            raise FileNotFoundError(
                f"tokenizer must be 'bytes', 'bpe' or a saved tokenizer's folder, got {tokenizer!r}"
            )
        ready = load_tokenizer(tokenizer)
    corpus = open_corpus(source, text_field, strict=strict)
    is_folder = source != "stdlib" and Path(source).is_dir()
    if is_folder and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"out {str(out)!r} is inside the source folder, and would be part of the corpus next time"
        )

    def batches(stage: str) -> Iterator[list[tuple[Document, str]]]:
        for batch in _batched(_split(corpus, validation_fraction, seed)):
            yield batch
            if progress is not None:
                progress(stage, corpus.position, corpus.size)

    with _replacing(out, overwrite) as folder:
        if tokenizer == "bytes":
            ready = byte_tokenizer()
        elif tokenizer == "bpe":
            training = (
                [document.text for document, split in batch if split == "train"]
                for batch in batches("training the tokenizer")
            )
            ready = train_bpe(training, vocab_size)
        assert ready is not None
        ready.save_pretrained(folder / TOKENIZER)
        splits = _write(batches("writing tokens"), folder, ready, corpus.source)
    return Prepared(out, splits["train"], splits["validation"], corpus.skipped, vocabulary_size(ready))


def _write(
    batches: Iterator[list[tuple[Document, str]]],
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    source: str,
) -> dict[str, PreparedSplit]:
    encoder = Encoder(tokenizer)
    end_of_text = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    digest = tokenizer_hash(folder / TOKENIZER)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                TokenFileWriter(folder / split, vocabulary_size(tokenizer), digest, source)
            )
            for split in SPLITS
        }
        for batch in batches:
            ids = encoder.encode([document.text for document, _ in batch])
            for (document, split), document_ids in zip(batch, ids, strict=True):
                writers[split].add(np.concatenate((document_ids, end_of_text)), len(document.text.encode()))
    return {
        split: PreparedSplit(writer.documents, writer.tokens, writer.text_bytes)
        for split, writer in writers.items()
    }


def _split(corpus: Corpus, validation_fraction: float, seed: int) -> Iterator[tuple[Document, str]]:
    """Yield each document with its split's name.

    A document is used for validation if its hash, in [0, 1), is below the fraction. Until both splits have a
    document, the one whose hash is nearest to the empty split is held back, so that at the end neither is
    empty. Nothing else changes the order.
    """
    held: Document | None = None
    held_hash = 0.0
    held_split = ""
    filled: set[str] = set()
    documents = 0
    for documents, document in enumerate(corpus, start=1):  # noqa: B007
        value = _hash(seed, document.name)
        split = "validation" if value < validation_fraction else "train"
        filled.add(split)
        if len(filled) == 2:
            if held is not None:
                yield held, held_split
                held = None
            yield document, split
        elif held is None:
            held, held_hash, held_split = document, value, split
        else:
            # All so far fell into one split; the held one is nearest to the other.
            nearer = value < held_hash if split == "train" else value > held_hash
            if nearer:
                held, held_hash, document = document, value, held
            yield document, split
    if documents < 2:
        left_out = "; ".join([str(corpus.skipped), *corpus.skipped.examples])
        raise ValueError(
            f"source {corpus.source!r} has {documents} documents (left out: {left_out}); "
            "a training and a validation split need at least 2"
        )
    if held is not None:
        yield held, "validation" if held_split == "train" else "train"


def _hash(seed: int, name: str) -> float:
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _batched(documents: Iterator[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[0].text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder, which replaces `out` if the block succeeds and is removed otherwise.

    A killed process leaves a hidden folder, which the next preparation of the same `out` finishes or removes.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = target.with_name(f".{target.name}.preparing")
    new, old = workspace / "new", workspace / "old"

    def settle() -> None:
        # The old folder is moved away only once the new one is complete, so the new one may replace it.
        if old.exists() and not target.exists():
            new.rename(target)
        shutil.rmtree(workspace, ignore_errors=True)

    with _lock(target.with_name(f".{target.name}.lock"), out):
        settle()
        _check_out(out, overwrite)
        try:
            new.mkdir(parents=True)
            yield new
            sync_tree(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
            sync_folder(target.parent)
        finally:
            settle()


def _check_out(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"out {str(out)!r} exists; choose another folder or overwrite it (--overwrite)")
    if not out.is_dir():
        raise FileExistsError(f"out {str(out)!r} is not a folder; it stays as it is")
    entries = {entry.name for entry in out.iterdir()}
    own = {TOKENIZER, *(f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".json"))}
    strangers = sorted(entries - own)
    if strangers:
        raise FileExistsError(
            f"out {str(out)!r} holds more than prepared data ({strangers[0]!r}); it stays as it is"
        )
    if not any(is_token_description(out / f"{split}.json") for split in SPLITS):
        raise FileExistsError(f"out {str(out)!r} does not look like prepared data; it stays as it is")


@contextmanager
def _lock(path: Path, out: Path) -> Iterator[None]:
    """Lock the file `path`, and remove it at the end. A killed process leaves the file, not the lock."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our opening and locking it.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise FileExistsError(f"out {str(out)!r} is being prepared by another process")
        try:
            yield
        finally:
            path.unlink()
