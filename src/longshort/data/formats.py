"""Readers for the files of a corpus: the suffix of a file gives its format and its compression.

- ``.jsonl``, ``.ndjson``: one text per line, in a field of an object;
- ``.parquet``: one text per row, in a column;
- any other suffix: the file is one text, in UTF-8.

All but parquet may be compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``, as in ``.jsonl.zst``. Case does not
matter. Files are read as streams, which hold one text and a buffer in memory, or a few rows of parquet.

Reading can begin anywhere: lines that are not compressed at their byte, parquet at a group of rows; of
compressed lines the beginning is read again, without parsing it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from longshort.extras import require

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

READABLE = "UTF-8 text, .jsonl and .ndjson, each also as .gz, .bz2, .xz or .zst, and .parquet"
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_READ_CHARACTERS = 1 << 20
_BUFFER_BYTES = 1 << 20
_ROWS = 64
_JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
    list: "an array", dict: "an object",
}  # fmt: skip
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class NoText:
    """The reason why a file or a record gives no document."""

    kind: Literal["not text", "without text"]
    """A file or text that is not UTF-8, or a record that has no string where its text should be."""
    reason: str
    """A sentence that names the file, and the line or row."""


@dataclass(frozen=True)
class Place:
    """Where reading a file stands."""

    records: int = 0
    """Lines or rows that have been read; 1 for a file that is one text."""
    byte: int = 0
    """Position in the file; only that of uncompressed lines counts."""


_BEGINNING = Place()


def require_packages(names: list[str]) -> None:
    """Raise an error, before anything is read, if one of these files needs a package that is missing.

    Raises:
        MissingPackageError: a package is missing; the message names the file and the command to install it.
    """
    needs = {"pyarrow": (".parquet",), "zstandard": (".zst",)}
    for package, suffixes in needs.items():
        name = next((name for name in names if name.lower().endswith(suffixes)), None)
        if name is None:
            continue
        require(name, package)


def read_texts(
    path: Path, name: str, file: BinaryIO, text_field: str, start: Place = _BEGINNING
) -> Iterator[tuple[int, str, str | NoText]]:
    """Yield, for each document of a file, the number of records read with it, its name and its text.

    Args:
        path: path of the file, for messages.
        name: name of the file within its corpus. It is the document's name, or the beginning of it:
            `name:line`, from 1, or `name:row`, from 0.
        file: the opened file; its position shows how far it is read.
        text_field: the field of a JSONL record, or the parquet column, that holds the text.
        start: where to begin, for a file that has been read up to there.

    Raises:
        ValueError: a compressed file or a parquet file is damaged or not one, a line is not JSON, or a
            parquet file has no such column of strings. The message names the file.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, name, file, text_field, start.records)
        return
    of_content = Path(path.stem).suffix.lower() if suffix in _OPENERS else suffix
    with _decompressed(path, file) as stream:
        if of_content in _JSONL_SUFFIXES:
            if stream is file:
                file.seek(start.byte)
            else:
                for _ in range(start.records):
                    next(stream, None)
            yield from _read_jsonl(path, name, stream, text_field, start.records)
        elif not start.records:
            text = _read_text(path, stream)
            if isinstance(text, NoText) and suffix in _OPENERS:
                while stream.read(_BUFFER_BYTES):  # only at the end is it known that it is not damaged
                    pass
            yield 1, name, text


def text_of(record: Any, text_field: str, where: str) -> str | NoText:
    """Return the text of a record, or why it has none.

    Args:
        record: as JSON or a dataset gave it.
        text_field: the field that holds the text.
        where: name of the record for the reason.
    """
    if not isinstance(record, dict):
        reason = f"{where} is {_json_type(record)}, not an object with a field {text_field!r}"
        return NoText("without text", reason)
    if text_field not in record:
        return NoText("without text", no_such_field(text_field, list(record), where))
    text = record[text_field]
    where = f"{where}: field {text_field!r}"
    if not isinstance(text, str):
        return NoText("without text", f"{where} is {_json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return NoText("not text", f"{where} holds half a surrogate pair, which is not text")
    return NoText("not text", f"{where} holds a NUL, which is not text") if "\0" in text else text


def no_such_field(text_field: str, fields: list[str], where: str) -> str:
    """Return the message for a record or a dataset that lacks the field."""
    known = ", ".join(map(repr, fields)) or "none"
    return f"{where} has no field {text_field!r} (text_field); its fields: {known}"


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


def _read_text(path: Path, stream: BinaryIO) -> str | NoText:
    pieces = []
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        # In pieces, so that reading a huge binary file ends at its first bytes.
        while piece := reader.read(_READ_CHARACTERS):
            if "\0" in piece:
                return _binary(path)
            pieces.append(piece)
    except UnicodeDecodeError as error:
        if b"\0" in error.object:
            return _binary(path)
        found = f"a byte {error.object[error.start]:#04x}"
        return NoText("not text", f"{path} is not UTF-8 text (it has {found}); readable: {READABLE}")
    finally:
        reader.detach()  # which would close the stream
    return "".join(pieces)


def _binary(path: Path) -> NoText:
    return NoText("not text", f"{path} is binary (NUL bytes), not text; readable: {READABLE}")


def _read_jsonl(
    path: Path, name: str, stream: BinaryIO, text_field: str, lines_read: int
) -> Iterator[tuple[int, str, str | NoText]]:
    for line_number, line in enumerate(stream, start=lines_read + 1):
        if line_number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line or line.isspace():
            continue
        where = f"{path}, line {line_number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        yield line_number, f"{name}:{line_number}", text_of(record, text_field, where)


def _read_parquet(
    path: Path, name: str, file: BinaryIO, text_field: str, rows_read: int
) -> Iterator[tuple[int, str, str | NoText]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)  # not the whole column at once
        _require_strings(path, table.schema_arrow, text_field)
        groups, row = _groups_from(table, rows_read)
        for batch in table.iter_batches(_ROWS, groups, columns=[text_field], use_threads=False):
            for value in batch.column(0):
                if row < rows_read:
                    row += 1
                    continue
                where = f"{path}, row {row}"
                try:
                    text = text_of({text_field: value.as_py()}, text_field, where)
                except UnicodeDecodeError:
                    text = NoText("not text", f"{where}: field {text_field!r} is not UTF-8 text")
                row += 1
                yield row, f"{name}:{row - 1}", text
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error


def _groups_from(table: ParquetFile, rows_read: int) -> tuple[list[int], int]:
    """Return the groups of rows of which some row is not read, and the number of the first of their rows."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first + rows > rows_read:
            return list(range(group, table.num_row_groups)), first
        first += rows
    return [], first


def _require_strings(path: Path, schema: pyarrow.Schema, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        known = ", ".join(map(repr, schema.names)) or "none"
        raise ValueError(f"{path} has no column {text_field!r} (text_field); its columns: {known}")
    kind = schema.field(text_field).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    is_string = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(values) for check in is_string):
        raise ValueError(f"{path}: column {text_field!r} (text_field) holds {kind}, not strings")


@contextmanager
def _decompressed(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    """Open the content of a file as a stream; damage to it is raised as a ValueError."""
    suffix = path.suffix.lower()
    if suffix not in _OPENERS:
        yield file
        return
    kind, open_stream = _OPENERS[suffix]
    try:
        yield open_stream(file)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not damaged content
            raise
        raise ValueError(f"{path} is not a whole {kind} file: {error}") from error


class _ZstandardStream(io.RawIOBase):
    """A stream over the content of consecutive frames.

    The stream of the package treats a file that is cut off as whole.
    """

    _PIECE = 1 << 8  # four bytes may expand to 128 KiB, so these to at most 8 MiB

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # of `zstd --long=31`
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._content:
            compressed = self._compressed or self._file.read(self._PIECE)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._decompress(compressed)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompress(self, compressed: bytes) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(compressed))
        except self._error as error:
            raise OSError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None


_OPENERS: dict[str, tuple[str, Callable[[BinaryIO], Any]]] = {
    ".gz": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": ("bzip2", bz2.BZ2File),
    ".xz": ("xz", lzma.LZMAFile),
    ".zst": ("zstandard", lambda file: io.BufferedReader(_ZstandardStream(file), _BUFFER_BYTES)),
}
"""The name of the format and the function that opens it as a stream, by suffix of compressed files."""
