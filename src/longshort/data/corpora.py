"""Corpora: iterators of documents over files and Hugging Face datasets.

A source is one of

- ``stdlib``: the ``*.py`` files of the running Python's standard library, so that no download is needed;
- a folder (all its files, recursively), a file, or a glob pattern (``**`` recurses);
- ``hf:NAME`` or ``hf:NAME:CONFIG``: the ``train`` split of a Hugging Face dataset, streamed.

`longshort.data.formats` reads the files: text, JSONL and parquet, also compressed.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshort.data.formats import NoText, no_such_field, read_texts, require_packages, text_of

_RECORDS_WITHOUT_TEXT = 10_000


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """The same on every machine: a relative path, `path:line` or `path:row`, or `split:row`."""
    text: str
    """Not empty, and encodable as UTF-8."""


@dataclass
class Skipped:
    """The files and records that one pass over a corpus left out."""

    hidden: int = 0
    """Files and folders of a source folder whose name begins with a dot."""
    not_text: int = 0
    """Files and records that are not UTF-8 text (a NUL byte counts as not text)."""
    without_text: int = 0
    """Records that have no text field, or something else than a string in it."""
    empty: int = 0
    """Files and records whose text has no character."""
    first_not_text: str | None = None
    """A sentence about the first one that is not text: its file, its line or row, and what it is instead."""
    first_without_text: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.hidden} hidden, {self.not_text} not UTF-8 text, {self.without_text} without text, "
            f"{self.empty} empty"
        )

    @property
    def examples(self) -> list[str]:
        """Return a sentence about the first of each kind."""
        return [reason for reason in (self.first_not_text, self.first_without_text) if reason is not None]

    def note(self, found: NoText) -> None:
        """Count a file or a record that gives no document."""
        if found.kind == "not text":
            self.not_text += 1
            self.first_not_text = self.first_not_text or found.reason
        else:
            self.without_text += 1
            self.first_without_text = self.first_without_text or found.reason


class Corpus(ABC):
    """Documents in a fixed order, one in memory at a time. Each iteration yields the same documents again."""

    source: str
    """The source as the user gave it."""
    size: int | None
    """Bytes to read in one pass; None if that is not known beforehand."""
    position: int
    """Bytes read so far in the present pass."""
    skipped: Skipped
    """The files and records that the present pass has left out so far."""

    def __init__(self, source: str, size: int | None, strict: bool, hidden: int = 0) -> None:
        self.source = source
        self.size = size
        self._strict = strict
        self._hidden = hidden
        self._begin()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            ValueError: something cannot be read: a file is damaged, a line is not JSON, a parquet file lacks
                the column, the first 10,000 records have no text; or, if the corpus is strict, a file or
                record is not text, or a record has none.
        """
        self._begin()
        has_documents = False
        for name, text in self._read():
            if isinstance(text, NoText):
                if self._strict:
                    raise ValueError(f"{text.reason}; strict does not leave it out")
                self.skipped.note(text)
                if not has_documents and self.skipped.without_text == _RECORDS_WITHOUT_TEXT:
                    raise ValueError(
                        f"source {self.source!r} begins with {_RECORDS_WITHOUT_TEXT:,} records without text: "
                        f"{self.skipped.first_without_text}"
                    )
            elif not text:
                self.skipped.empty += 1
            else:
                has_documents = True
                yield Document(name, text)

    def _begin(self) -> None:
        self.position = 0
        self.skipped = Skipped(hidden=self._hidden)

    @abstractmethod
    def _read(self) -> Iterator[tuple[str, str | NoText]]:
        """Yield names and texts, or why there is no text, and advances `position`."""


class FileCorpus(Corpus):
    """The files `root/name` for each of `names`, in that order."""

    def __init__(
        self, source: str, root: Path, names: list[str], text_field: str, strict: bool, hidden: int = 0
    ) -> None:
        require_packages(names)
        super().__init__(source, sum((root / name).stat().st_size for name in names), strict, hidden)
        self._root = root
        self._names = names
        self._text_field = text_field

    def _read(self) -> Iterator[tuple[str, str | NoText]]:
        finished = 0
        for name in self._names:
            path = self._root / name
            size = path.stat().st_size
            if not size:  # empty in every format
                yield name, ""
                continue
            with open(path, "rb") as file:
                for document_name, text in read_texts(path, name, file, self._text_field):
                    self.position = finished + file.tell()
                    yield document_name, text
            finished += size
            self.position = finished


class HubCorpus(Corpus):
    """The `train` split of a Hugging Face dataset, by name on the Hub or by folder, streamed."""

    def __init__(self, source: str, text_field: str, strict: bool) -> None:
        super().__init__(source, size=None, strict=strict)
        self._text_field = text_field
        name, _, config = source.removeprefix("hf:").partition(":")
        if not name:
            raise ValueError(f"source {source!r} names no dataset; write hf:NAME or hf:NAME:CONFIG")
        from datasets import load_dataset

        try:
            self._rows = load_dataset(name, config or None, split="train", streaming=True)
        except Exception as error:  # the Hub's client raises errors of a dozen unrelated kinds
            raise ValueError(f"source {source!r}: the dataset cannot be opened: {error}") from error
        columns = self._rows.column_names
        if columns is not None and text_field not in columns:
            raise ValueError(no_such_field(text_field, columns, f"source {source!r}"))

    def _read(self) -> Iterator[tuple[str, str | NoText]]:
        for index, row in enumerate(self._checked_rows()):
            text = text_of(row, self._text_field, f"source {self.source!r}, row {index}")
            self.position += len(text.encode()) if isinstance(text, str) else 0
            yield f"train:{index}", text

    def _checked_rows(self) -> Iterator[Any]:
        try:
            yield from self._rows
        except Exception as error:
            raise ValueError(f"source {self.source!r}: the dataset cannot be read: {error}") from error


def open_corpus(source: str | os.PathLike[str], text_field: str = "text", *, strict: bool = False) -> Corpus:
    """Find the files or the dataset behind `source`; nothing is read yet.

    Args:
        source: `stdlib`, a folder, a file, a glob pattern, or `hf:NAME[:CONFIG]`. A folder that is itself
            called `stdlib` is written `./stdlib`. In a folder, what is hidden is left out, and links to
            folders are not followed.
        text_field: the field that holds the text in JSONL records, parquet files and datasets.
        strict: reading fails at the first file or record that is not text, or has none. Otherwise these are
            left out, and counted.

    Raises:
        FileNotFoundError: no such file or folder, or no file in it, or no file matches the pattern.
        ModuleNotFoundError: a package is missing that one of the files needs.
        ValueError: the dataset cannot be opened or has no such field.
    """
    source = os.fspath(source)
    if not isinstance(text_field, str) or not text_field:
        raise ValueError(f"text_field must be the name of a field, got {text_field!r}")
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names, _ = _files_under(root, leave_out=("site-packages", "dist-packages"))
        names = [name for name in names if name.endswith(".py")]
        if not names:
            raise FileNotFoundError(f"source 'stdlib': this Python keeps no *.py files in {root}")
        return FileCorpus(source, root, names, text_field, strict)
    if source.startswith("hf:"):
        return HubCorpus(source, text_field, strict)
    path = Path(source)
    if source and path.is_dir():
        names, hidden = _files_under(path)
        if not names:
            raise FileNotFoundError(
                f"source: folder {source!r} holds no file ({hidden} hidden ones left out)"
            )
        return FileCorpus(source, path, names, text_field, strict, hidden)
    if path.is_file():
        return FileCorpus(source, path.parent, [path.name], text_field, strict)
    if not _is_pattern(source):
        raise FileNotFoundError(
            f"source: there is no file or folder {source!r} (other sources: stdlib, a glob pattern, hf:NAME)"
        )
    root, pattern = _split_pattern(path)
    matches = sorted(set(glob.glob(pattern, root_dir=root, recursive=True)))
    names = [name for name in matches if (root / name).is_file()]
    if not names:
        raise FileNotFoundError(f"source: no file matches {source!r}")
    return FileCorpus(source, root, names, text_field, strict)


def _files_under(root: Path, leave_out: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """Return the sorted relative paths of all files that are not hidden, and how many entries are hidden."""
    names, hidden = [], 0
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        hidden += sum(entry.startswith(".") for entry in subfolders + files)
        subfolders[:] = [
            entry for entry in subfolders if not entry.startswith(".") and entry not in leave_out
        ]
        paths = (Path(folder, entry) for entry in files if not entry.startswith("."))
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(names), hidden


def _raise(error: OSError) -> None:
    raise error


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _split_pattern(pattern: Path) -> tuple[Path, str]:
    """Split off the leading folders that are not patterns, so that names do not hold the machine's paths."""
    fixed = 0
    while not _is_pattern(pattern.parts[fixed]):
        fixed += 1
    return Path(*pattern.parts[:fixed]), os.path.join(*pattern.parts[fixed:])
