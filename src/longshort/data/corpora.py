"""Where text comes from: one iterator of documents over files, JSONL and Hugging Face datasets.

A source is one of

- ``stdlib``: the ``*.py`` files of the running Python's standard library, so that no download is needed;
- a folder (all its files, recursively), a file, or a glob pattern (``**`` recurses);
- ``hf:NAME`` or ``hf:NAME:CONFIG``: the ``train`` split of a Hugging Face dataset, streamed.

A file is one document, except that each line of a JSONL file is one (``.jsonl`` or ``.ndjson``, also with
``.gz``).
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_READ_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """Stable within its corpus whatever the machine: a relative path, `path:line` or `split:row`."""
    text: str
    """Not empty, and encodable as UTF-8."""


@dataclass
class Skipped:
    """What one pass over a corpus left out."""

    hidden: int = 0
    """Files and folders of a source folder whose name begins with a dot."""
    not_text: int = 0
    """Files and records that are not UTF-8 text (a NUL byte counts as not text)."""
    empty: int = 0

    def __str__(self) -> str:
        return f"{self.hidden} hidden, {self.not_text} not UTF-8 text, {self.empty} empty"


class Corpus(ABC):
    """Documents in a fixed order, one in memory at a time. Each iteration yields the same anew."""

    source: str
    """As the user gave it."""
    size: int | None
    """Bytes to read in one pass; None if that is not known beforehand."""
    position: int
    """Bytes read so far in the present pass."""
    skipped: Skipped
    """What the present pass has left out so far."""

    def __init__(self, source: str, size: int | None, hidden: int = 0) -> None:
        self.source = source
        self.size = size
        self._hidden = hidden
        self._begin()

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents.

        Raises:
            ValueError: a record is not what the source promised: not JSON, no text field, not a string in it.
        """
        self._begin()
        for name, text in self._read():
            if text is None:
                self.skipped.not_text += 1
            elif not text:
                self.skipped.empty += 1
            else:
                yield Document(name, text)

    def _begin(self) -> None:
        self.position = 0
        self.skipped = Skipped(hidden=self._hidden)

    @abstractmethod
    def _read(self) -> Iterator[tuple[str, str | None]]:
        """Yields names and texts, None for what is not text, and advances `position`."""


class FileCorpus(Corpus):
    """The files `root/name` for each of `names`, in that order."""

    def __init__(self, source: str, root: Path, names: list[str], text_field: str, hidden: int = 0) -> None:
        super().__init__(source, sum((root / name).stat().st_size for name in names), hidden)
        self._root = root
        self._names = names
        self._text_field = text_field

    def _read(self) -> Iterator[tuple[str, str | None]]:
        finished = 0
        for name in self._names:
            path = self._root / name
            size = path.stat().st_size
            with open(path, "rb") as file:
                if name.lower().endswith(_JSONL_SUFFIXES):
                    for line_number, text in self._read_jsonl(path, file):
                        self.position = finished + file.tell()
                        yield f"{name}:{line_number}", text
                else:
                    text = _read_text(file)
                    self.position = finished + size
                    yield name, text
            finished += size
            self.position = finished

    def _read_jsonl(self, path: Path, file: BinaryIO) -> Iterator[tuple[int, str | None]]:
        lines = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
        try:
            for line_number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                where = f"{path}, line {line_number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is not JSON: {error}") from error
                yield line_number, _text_of(record, self._text_field, where)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error


class HubCorpus(Corpus):
    """The `train` split of a Hugging Face dataset, by name on the Hub or by folder, streamed."""

    def __init__(self, source: str, text_field: str) -> None:
        super().__init__(source, size=None)
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
            raise ValueError(_no_such_field(text_field, columns, f"source {source!r}"))

    def _read(self) -> Iterator[tuple[str, str | None]]:
        for index, row in enumerate(self._checked_rows()):
            text = _text_of(row, self._text_field, f"source {self.source!r}, row {index}")
            self.position += len(text.encode()) if text else 0
            yield f"train:{index}", text

    def _checked_rows(self) -> Iterator[Any]:
        try:
            yield from self._rows
        except Exception as error:
            raise ValueError(f"source {self.source!r}: the dataset cannot be read: {error}") from error


def open_corpus(source: str | os.PathLike[str], text_field: str = "text") -> Corpus:
    """Finds the files or the dataset behind `source`; nothing is read yet.

    Args:
        source: `stdlib`, a folder, a file, a glob pattern, or `hf:NAME[:CONFIG]`. A folder that is itself
            called `stdlib` is written `./stdlib`. In a folder, what is hidden is left out, and links to
            folders are not followed.
        text_field: the field that holds the text in JSONL records and datasets.

    Raises:
        FileNotFoundError: no such file or folder, or no file in it, or no file matches the pattern.
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
        return FileCorpus(source, root, names, text_field)
    if source.startswith("hf:"):
        return HubCorpus(source, text_field)
    path = Path(source)
    if source and path.is_dir():
        names, hidden = _files_under(path)
        if not names:
            raise FileNotFoundError(
                f"source: folder {source!r} holds no file ({hidden} hidden ones left out)"
            )
        return FileCorpus(source, path, names, text_field, hidden)
    if path.is_file():
        return FileCorpus(source, path.parent, [path.name], text_field)
    if not _is_pattern(source):
        raise FileNotFoundError(
            f"source: there is no file or folder {source!r} (other sources: stdlib, a glob pattern, hf:NAME)"
        )
    root, pattern = _split_pattern(path)
    matches = sorted(set(glob.glob(pattern, root_dir=root, recursive=True)))
    names = [name for name in matches if (root / name).is_file()]
    if not names:
        raise FileNotFoundError(f"source: no file matches {source!r}")
    return FileCorpus(source, root, names, text_field)


def _files_under(root: Path, leave_out: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """Returns the sorted relative paths of all files that are not hidden, and how many entries are hidden."""
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
    """Splits off the leading folders that are not patterns, so that names do not hold the machine's paths."""
    fixed = 0
    while not _is_pattern(pattern.parts[fixed]):
        fixed += 1
    return Path(*pattern.parts[:fixed]), os.path.join(*pattern.parts[fixed:])


def _read_text(file: BinaryIO) -> str | None:
    pieces = []
    try:
        # In pieces, so that a huge binary file is given up at its first bytes.
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as reader:
            while piece := reader.read(_READ_CHARACTERS):
                if "\0" in piece:
                    return None
                pieces.append(piece)
    except UnicodeDecodeError:
        return None
    return "".join(pieces)


def _text_of(record: Any, text_field: str, where: str) -> str | None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object with a field {text_field!r}")
    if text_field not in record:
        raise ValueError(_no_such_field(text_field, list(record), where))
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return None
    return None if "\0" in text else text


def _no_such_field(text_field: str, fields: list[str], where: str) -> str:
    known = ", ".join(map(repr, fields)) or "none"
    return f"{where} has no field {text_field!r} (text_field); its fields: {known}"
