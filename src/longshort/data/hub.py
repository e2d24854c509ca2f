"""Datasets of the Hugging Face Hub, or folders in their form, as streams of documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longshort.data.corpus import Corpus
from longshort.data.formats import NoText, no_such_field, text_of
from longshort.extras import require

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

_REVISION = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")


class HubCorpus(Corpus):
    """The `train` split of a Hugging Face dataset, streamed: no more than a part of a file is in memory.

    Args:
        source: the source as the user gave it.
        dataset: NAME or NAME:CONFIG; NAME is a name on the Hub or a folder.
        text_field: the field that holds the text.
        strict: see `open_corpus`.

    Raises:
        ValueError: there is no such dataset, configuration, split or field, or its first row cannot be read.
    """

    def __init__(self, source: str, dataset: str, text_field: str, strict: bool) -> None:
        super().__init__(source, size=None, strict=strict)
        self._text_field = text_field
        self._name, _, self._config = dataset.partition(":")
        if not self._name:
            raise ValueError(f"source {source!r} names no dataset; write hf:NAME or hf:NAME:CONFIG")
        self._builder = self._open(None)
        self._stream = self._rows()
        self._rows_read = 0
        columns = self._stream.column_names
        if columns is None:  # formats like CSV name them only in a row
            columns = list(next(self._checked(self._rows()), {text_field: ""}))
        if text_field not in columns:
            raise ValueError(no_such_field(text_field, columns, f"source {source!r}"))

    def changed_since(self, state: dict[str, Any]) -> str | None:
        revision = state["reader"]["revision"]
        if revision is not None and revision != self._revision:
            self._builder = self._open(revision)  # the Hub keeps what the dataset was
        if state["reader"]["digest"] == self._digest:
            return None
        return "its files are not the same now"

    def _open(self, revision: str | None) -> DatasetBuilder:
        require(f"source {self.source!r}", "datasets")
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(self._name, self._config or None, revision=revision)
        except Exception as error:  # the Hub's client raises errors of a dozen unrelated kinds
            raise ValueError(f"source {self.source!r}: the dataset cannot be opened: {error}") from error
        files = getattr(builder.config, "data_files", None) or {}
        train = files.get("train", [])
        known = [list(train), getattr(train, "origin_metadata", None), self._text_field]
        self._digest = hashlib.sha256(repr(known).encode()).hexdigest()
        match = _REVISION.match(str(train[0])) if train else None
        self._revision = match[1] if match else None
        return builder

    def _rows(self) -> IterableDataset:
        rows: Any  # the stub allows for a dictionary of splits
        try:
            rows = self._builder.as_streaming_dataset(split="train")
        except Exception as error:
            raise ValueError(f"source {self.source!r}: the dataset cannot be opened: {error}") from error
        if rows.column_names is not None and self._text_field in rows.column_names:
            rows = rows.select_columns([self._text_field])  # decodes no other
        return rows

    def _read(self, state: dict[str, Any] | None) -> Iterator[tuple[str, str | NoText]]:
        self._stream = self._rows()
        if state:
            self._stream.load_state_dict(state["stream"])
        first = state["rows"] if state else 0
        for index, row in enumerate(self._checked(self._stream), start=first):
            text = text_of(row, self._text_field, f"source {self.source!r}, row {index}")
            self.position += len(text.encode()) if isinstance(text, str) else 0
            self._rows_read = index + 1
            yield f"train:{index}", text

    def _read_sample(self, size: int) -> Iterator[tuple[str, str | NoText]]:
        for name, text in self._read(None):
            yield name, text
            if self.position >= size:
                return

    def _reader_state(self) -> dict[str, Any]:
        return {
            "rows": self._rows_read,
            "stream": self._stream.state_dict(),
            "digest": self._digest,
            "revision": self._revision,
        }

    def _checked(self, rows: IterableDataset) -> Iterator[Any]:
        try:
            yield from rows
        except Exception as error:
            raise ValueError(f"source {self.source!r}: the dataset cannot be read: {error}") from error
