"""Token files: `NAME.bin`, the token ids of all documents end to end, and `NAME.json`, which describes it.

`NAME.bin` holds little-endian uint16, or uint32 where the vocabulary needs it. `NAME.json` holds `format`,
`dtype`, `length` (tokens), `document_offsets` (documents + 1: document i is
`tokens[offsets[i]:offsets[i + 1]]`), `document_bytes` (UTF-8 bytes of each document's text), `vocab_size`,
`tokenizer_hash` and `source`.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longshort.data.tokenization import tokenizer_hash

FORMAT = "longshort tokens 1"
SPLITS = ("train", "validation")
TOKENIZER = "tokenizer"
_JOURNAL_ENTRY = 16  # bytes: two int64
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class TokenFileWriter:
    """Writes documents one after another; use it in a `with` block.

    Leaving the block completes both files and syncs them to disk; an exception in it removes them, unless
    `commit` was called.

    Args:
        path: path to write to, without suffix.
        vocab_size: ids are below it; they take two bytes if it is at most 65,536, else four.
        tokenizer_hash: `tokenizer_hash(folder)` of the tokenizer that made the ids.
        source: source of the text, for the reader's information.
        journal: file for the lengths of the documents, which `commit` needs; None: they stay in memory.
        committed: what a `commit` returned, to go on there: what came after it is removed.

    Raises:
        FileExistsError: one of the two files exists, and `committed` is None.
        ValueError: `vocab_size` is not in 1 … 2³²; a file is shorter than what was committed; on leaving the
            block: no document was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int,
        tokenizer_hash: str,
        source: str,
        *,
        journal: Path | None = None,
        committed: dict[str, int] | None = None,
    ) -> None:
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f"vocab_size must be in 1 … 2**32, got {vocab_size}")
        self._bin, self._json = _paths(path)
        self._vocab_size = vocab_size
        self._tokenizer_hash = tokenizer_hash
        self._source = source
        self._dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        self._journal = journal
        self._pending = array("q")  # tokens and bytes of each document after the last commit
        self.documents = self.tokens = self.text_bytes = 0
        self._in_journal = 0
        if committed is not None:
            assert journal is not None
            self.documents = self._in_journal = committed["documents"]
            self.tokens, self.text_bytes = committed["tokens"], committed["text_bytes"]
            self._json.unlink(missing_ok=True)
            _cut_off(self._bin, self.tokens * _DTYPES[self._dtype].itemsize)
            _cut_off(journal, self.documents * _JOURNAL_ENTRY)
        elif self._json.exists():
            raise FileExistsError(f"{self._json} exists")
        self._file = open(self._bin, "xb" if committed is None else "ab")  # noqa: SIM115 (closed by __exit__)

    def add(self, token_ids: NDArray[np.integer], text_bytes: int) -> None:
        """Append one document.

        Args:
            token_ids: (tokens,) of any integer dtype, its end-of-text token included; at least one.
            text_bytes: UTF-8 bytes of the document's text.

        Raises:
            ValueError: no ids, or an id outside 0 … vocab_size - 1, or `text_bytes` < 0.
        """
        if token_ids.ndim != 1 or token_ids.size == 0:
            raise ValueError(f"token_ids must be one-dimensional and not empty, got shape {token_ids.shape}")
        smallest, largest = int(token_ids.min()), int(token_ids.max())
        if smallest < 0 or largest >= self._vocab_size:
            raise ValueError(
                f"token_ids must be in 0 … {self._vocab_size - 1}, got some in {smallest} … {largest}"
            )
        if text_bytes < 0:
            raise ValueError(f"text_bytes must not be negative, got {text_bytes}")
        self._file.write(token_ids.astype(_DTYPES[self._dtype]).tobytes())
        self._pending.extend((token_ids.size, text_bytes))
        self.documents += 1
        self.tokens += token_ids.size
        self.text_bytes += text_bytes

    def commit(self) -> dict[str, int]:
        """Wait until all documents so far are on the disk; return what `committed` takes, as JSON."""
        assert self._journal is not None, "without a journal there is nothing to go on from"
        self._file.flush()
        os.fsync(self._file.fileno())
        with open(self._journal, "ab") as file:
            file.write(np.array(self._pending, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._in_journal = self.documents
        self._pending = array("q")
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._complete()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._file.close()
            if error is not None:
                self._json.unlink(missing_ok=True)
                if not self._in_journal:
                    self._bin.unlink(missing_ok=True)

    def _complete(self) -> None:
        if not self.documents:
            raise ValueError(f"{self._bin}: no document was written")
        self._file.flush()
        os.fsync(self._file.fileno())
        description = {
            "format": FORMAT,
            "dtype": self._dtype,
            "length": self.tokens,
            "vocab_size": self._vocab_size,
            "tokenizer_hash": self._tokenizer_hash,
            "source": self._source,
        }
        with open(self._json, "x", encoding="utf-8") as file:
            file.write(json.dumps(description)[:-1])
            file.write(', "document_offsets": [0')
            offset = 0
            for entries in self._entries():  # in parts, as there may be many millions
                offsets = offset + np.cumsum(entries[:, 0])
                file.writelines(f", {number}" for number in offsets.tolist())
                offset = int(offsets[-1])
            file.write('], "document_bytes": [')
            separator = ""
            for entries in self._entries():
                file.write(separator + ", ".join(map(str, entries[:, 1].tolist())))
                separator = ", "
            file.write("]}")
            file.flush()
            os.fsync(file.fileno())

    def _entries(self) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens and bytes of each document, in order: (documents, 2), a part at a time."""
        if self._in_journal:
            assert self._journal is not None
            with open(self._journal, "rb") as file:
                while content := file.read(_JOURNAL_ENTRY << 16):
                    yield np.frombuffer(content, dtype="<i8").reshape(-1, 2)
        if self._pending:
            yield np.array(self._pending, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A token file opened for reading; the tokens stay on disk until they are touched."""

    path: Path
    """The path of both files without suffix."""
    tokens: np.memmap[Any, np.dtype[Any]]
    """(length,) of uint16 or uint32, read-only."""
    document_offsets: NDArray[np.int64]
    """(documents + 1,): the start of each document, then the length."""
    document_bytes: NDArray[np.int64]
    """(documents,): UTF-8 bytes of each document's text, without its end-of-text token."""
    vocab_size: int
    tokenizer_hash: str
    source: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open `path.bin` and `path.json`.

        Raises:
            FileNotFoundError: one of the two is missing.
            ValueError: the description is not valid, or disagrees with the size of the tokens.
        """
        bin_path, json_path = _paths(path)
        for file in (bin_path, json_path):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing")
        description = _read_description(json_path)
        dtype = _DTYPES.get(_field(description, "dtype", str, json_path))
        if dtype is None:
            raise ValueError(f"{json_path}: dtype must be uint16 or uint32, is {description['dtype']!r}")
        length = _field(description, "length", int, json_path)
        if bin_path.stat().st_size != length * dtype.itemsize:
            raise ValueError(
                f"{bin_path} has {bin_path.stat().st_size} bytes, but {json_path.name} states {length} "
                f"tokens of {dtype.itemsize} bytes: the file is cut off or belongs to another description"
            )
        offsets = _integers(description, "document_offsets", json_path)
        text_bytes = _integers(description, "document_bytes", json_path)
        if len(offsets) != len(text_bytes) + 1:
            raise ValueError(
                f"{json_path}: {len(text_bytes)} document_bytes need {len(text_bytes) + 1} document_offsets, "
                f"there are {len(offsets)}"
            )
        if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) <= 0).any():
            raise ValueError(
                f"{json_path}: document_offsets must rise strictly from 0 to the length, {length}"
            )
        if (text_bytes < 0).any():
            raise ValueError(f"{json_path}: document_bytes must not be negative")
        vocab_size = _field(description, "vocab_size", int, json_path)
        if not 1 <= vocab_size <= 2 ** (8 * dtype.itemsize):
            raise ValueError(f"{json_path}: vocab_size {vocab_size} does not fit {dtype.name}")
        return cls(
            path=Path(path),
            tokens=np.memmap(bin_path, dtype=dtype, mode="r", shape=(length,)),
            document_offsets=offsets,
            document_bytes=text_bytes,
            vocab_size=vocab_size,
            tokenizer_hash=_field(description, "tokenizer_hash", str, json_path),
            source=_field(description, "source", str, json_path),
        )

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    @property
    def documents(self) -> int:
        return len(self.document_bytes)


@dataclass(frozen=True)
class DataFolder:
    """A folder made by `longshort data`: token files of two splits, and their tokenizer."""

    path: Path
    train: TokenFile
    validation: TokenFile
    tokenizer_dir: Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a prepared folder.

        Raises:
            FileNotFoundError: the folder or a part of it is missing.
            ValueError: a part is damaged, or the parts do not belong together.
        """
        path = Path(folder)
        remedy = f"make it with `longshort data SOURCE --out {path}`"
        if not path.is_dir():
            raise FileNotFoundError(f"there is no data folder {str(path)!r}; {remedy}")
        parts = [file for split in SPLITS for file in _paths(path / split)]
        parts.append(path / TOKENIZER / "tokenizer.json")
        missing = [str(part.relative_to(path)) for part in parts if not part.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{str(path)!r} is not prepared data: it lacks {', '.join(missing)}; {remedy}"
            )
        train, validation = (TokenFile.open(path / split) for split in SPLITS)
        digest = tokenizer_hash(path / TOKENIZER)
        for split in (train, validation):
            if split.tokenizer_hash != digest:
                raise ValueError(
                    f"{split.path}.json was made with another tokenizer than {path / TOKENIZER}; {remedy}"
                )
        return cls(path, train, validation, path / TOKENIZER)


def is_token_description(path: Path) -> bool:
    """Return whether `path` is the JSON half of a token file, by its format field."""
    try:
        _read_description(path)
    except (OSError, ValueError):
        return False
    return True


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    return Path(f"{os.fspath(path)}.bin"), Path(f"{os.fspath(path)}.json")


def _cut_off(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"{path} has {found} bytes, but {size} were written and committed")
    if path.exists():
        os.truncate(path, size)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a token file (format {FORMAT!r})")
    return description


def _field(description: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    value = description.get(name)
    if type(value) is not kind:
        raise ValueError(f"{path}: {name} must be {kind.__name__}, is {value!r}")
    return value


def _integers(description: dict[str, Any], name: str, path: Path) -> NDArray[np.int64]:
    values = _field(description, name, list, path)
    try:
        numbers = np.asarray(values)
    except ValueError:  # nested lists of unequal length
        numbers = np.asarray(None)
    if numbers.ndim != 1 or numbers.dtype.kind != "i":
        raise ValueError(f"{path}: {name} must be a list of integers, not empty")
    return numbers.astype(np.int64)
