"""What all corpora have in common: documents, what is left out, and going on where a pass was interrupted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from longshort.data.formats import NoText

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
        self._begin(None)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            ValueError: something cannot be read: a file is damaged, a line is not JSON, a parquet file lacks
                the column, the first 10,000 records have no text; or, if the corpus is strict, a file or
                record is not text, or a record has none.
        """
        return self.read()

    def read(self, state: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the documents after those that had been read when `state` was taken; None: all.

        Raises:
            ValueError: as iteration does.
        """
        self._begin(state)
        return self._documents(self._read(state["reader"] if state else None))

    def sample(self, size: int) -> Iterator[Document]:
        """Yield documents with about `size` bytes of text, always the same ones; all, if they are so few.

        Those of files are taken evenly from all files, from the beginning of each, in proportion to the sizes
        on the disk; those of a dataset from its beginning.

        Raises:
            ValueError: as iteration does.
        """
        self._begin(None)
        return self._documents(self._read_sample(size))

    @property
    def state(self) -> dict[str, Any]:
        """Where the present pass stands, after the document that it yielded last, as JSON for `read`."""
        return {
            "position": self.position,
            "skipped": asdict(self.skipped),
            "has_documents": self._has_documents,
            "reader": self._reader_state(),
        }

    @abstractmethod
    def changed_since(self, state: dict[str, Any]) -> str | None:
        """Return what of the part read before `state` has changed since; None if `read` can go on there."""

    def _documents(self, records: Iterator[tuple[str, str | NoText]]) -> Iterator[Document]:
        for name, text in records:
            if isinstance(text, NoText):
                if self._strict:
                    raise ValueError(f"{text.reason}; strict does not leave it out")
                self.skipped.note(text)
                if not self._has_documents and self.skipped.without_text == _RECORDS_WITHOUT_TEXT:
                    raise ValueError(
                        f"source {self.source!r} begins with {_RECORDS_WITHOUT_TEXT:,} records without text: "
                        f"{self.skipped.first_without_text}"
                    )
            elif not text:
                self.skipped.empty += 1
            else:
                self._has_documents = True
                yield Document(name, text)

    def _begin(self, state: dict[str, Any] | None) -> None:
        self.position = state["position"] if state else 0
        self.skipped = Skipped(**state["skipped"]) if state else Skipped(hidden=self._hidden)
        self._has_documents = bool(state and state["has_documents"])

    @abstractmethod
    def _read(self, state: dict[str, Any] | None) -> Iterator[tuple[str, str | NoText]]:
        """Yield names and texts, or why there is no text, and advances `position`."""

    @abstractmethod
    def _read_sample(self, size: int) -> Iterator[tuple[str, str | NoText]]:
        """Yield as `_read` does, but less."""

    @abstractmethod
    def _reader_state(self) -> dict[str, Any]:
        """Return what `_read` needs to go on after the record that it yielded last."""
