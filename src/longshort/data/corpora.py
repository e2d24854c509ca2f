"""Corpora: iterators of documents over files and Hugging Face datasets.

A source is one of

- ``stdlib``: the ``*.py`` files of the running Python's standard library, so that no download is needed;
- a folder (all its files, recursively), a file, or a glob pattern (``**`` recurses);
- ``hf:NAME`` or ``hf:NAME:CONFIG``: the ``train`` split of a Hugging Face dataset, streamed; also just
  ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, where there is no local file or folder ``OWNER``.

`longshort.data.formats` reads the files: text, JSONL and parquet, also compressed; `longshort.data.hub` reads
the datasets.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longshort.data.corpus import Corpus
from longshort.data.formats import NoText, Place, read_texts, require_packages
from longshort.data.hub import HubCorpus

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", re.ASCII)


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
        self._seen = _digest()
        self._stands = (0, Place())

    def changed_since(self, state: dict[str, Any]) -> str | None:
        read = state["reader"]["files"]
        digest = _digest()
        for name in self._names[:read]:
            _note_file(digest, self._root / name, name)
        if digest.hexdigest() == state["reader"]["digest"]:
            return None
        return f"of the {read:,} files read before, some are not the same now (by name, size or time)"

    def _read(self, state: dict[str, Any] | None) -> Iterator[tuple[str, str | NoText]]:
        first = state["files"] - 1 if state else 0  # the file in which reading stood
        start = Place(state["records"], state["byte"]) if state else Place()
        self._seen = _digest()
        finished = 0
        for index, name in enumerate(self._names):
            path = self._root / name
            size = _note_file(self._seen, path, name)
            if index >= first:
                for place, document_name, text in self._read_file(name, size, start):
                    self.position = finished + place.byte
                    self._stands = (index + 1, place)
                    yield document_name, text
                start = Place()
                self.position = finished + size
            finished += size

    def _read_sample(self, size: int) -> Iterator[tuple[str, str | NoText]]:
        assert self.size is not None
        taken = finished = 0
        for name in self._names:
            bytes_in_file = (self._root / name).stat().st_size
            due = size * (finished + bytes_in_file) / max(self.size, 1)
            if taken < due:
                for place, document_name, text in self._read_file(name, bytes_in_file, Place()):
                    self.position = finished + place.byte
                    taken += len(text.encode()) if isinstance(text, str) else 0
                    yield document_name, text
                    if taken >= due:
                        break
            finished += bytes_in_file
            self.position = finished

    def _read_file(self, name: str, size: int, start: Place) -> Iterator[tuple[Place, str, str | NoText]]:
        path = self._root / name
        if not size:  # empty in every format
            yield Place(), name, ""
            return
        with open(path, "rb") as file:
            for records, document_name, text in read_texts(path, name, file, self._text_field, start):
                yield Place(records, file.tell()), document_name, text

    def _reader_state(self) -> dict[str, Any]:
        files, place = self._stands
        return {
            "files": files,
            "records": place.records,
            "byte": place.byte,
            "digest": self._seen.hexdigest(),
        }


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _note_file(digest: hashlib.blake2b, path: Path, name: str) -> int:
    """Add what tells whether a file has changed to a digest; return the file's size."""
    found = path.stat()
    digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return found.st_size


def open_corpus(source: str | os.PathLike[str], text_field: str = "text", *, strict: bool = False) -> Corpus:
    """Find the files or the dataset behind `source`; nothing is read yet.

    Args:
        source: `stdlib`, a folder, a file, a glob pattern, or `hf:NAME[:CONFIG]`. A folder that is itself
            called `stdlib` is written `./stdlib`. In a folder, what is hidden is left out, and links to
            folders are not followed. `OWNER/NAME[:CONFIG]` is a dataset too, if there is no such file or
            folder, and none called OWNER.
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
        return HubCorpus(source, source.removeprefix("hf:"), text_field, strict)
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
    if _HUB_NAME.fullmatch(source) and not os.path.lexists(path.parts[0]):
        return HubCorpus(source, source, text_field, strict)
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
