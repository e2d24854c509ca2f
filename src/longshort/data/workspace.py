"""The hidden folder beside `out` in which a data folder is made, so that it is complete or absent.

`.OUT.preparing/new` becomes `out` by renaming; an old `out` waits in `.OUT.preparing/old` meanwhile. Beside
them `progress.json` says what is finished, so that a preparation that was killed goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longshort.data.files import sync_folder, sync_tree
from longshort.data.token_files import SPLITS, TOKENIZER, is_token_description

_FORMAT = "longshort preparation 1"
_PROGRESS = "progress.json"


class Workspace:
    """The hidden folder of one preparation; `open_workspace` makes it.

    Args:
        folder: its path.
        settings: JSON of all that decides what is written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.new = folder / "new"
        self.old = folder / "old"
        self.folder = folder
        self.kept = False
        """Whether it holds work that an error should not remove."""
        self._settings = settings
        self._record = _read_record(folder) or {}

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the last `keep` recorded; None if there was none."""
        return self._record.get("progress")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `complete` recorded; None if it was not called."""
        return self._record.get("result")

    @property
    def is_renamed(self) -> bool:
        """Whether all is done but the removal of this folder."""
        return self.result is not None and not self.new.exists()

    def differences(self) -> list[str]:
        """Return what is not as it was when the work in the folder began."""
        before = self._record.get("settings", {})
        names = [*self._settings, *(name for name in before if name not in self._settings)]
        return [
            f"{name} was {before.get(name)!r}, is {self._settings.get(name)!r}"
            for name in names
            if before.get(name) != self._settings.get(name)
        ]

    def keep(self, progress: dict[str, Any]) -> None:
        """Record what is finished and on the disk; from now on an error leaves the folder as it is."""
        self._write({"progress": progress})
        self.kept = True

    def complete(self, result: dict[str, Any]) -> None:
        """Record that `new` is complete, and wait until it is on the disk."""
        sync_tree(self.new)
        self._write({"progress": self.progress, "result": result})

    def clear(self) -> None:
        """Remove all work, and begin anew."""
        (self.folder / _PROGRESS).unlink(missing_ok=True)  # first, as it vouches for the rest
        shutil.rmtree(self.folder, ignore_errors=True)
        self._record = {}
        self.kept = False

    def _write(self, record: dict[str, Any]) -> None:
        record = {"format": _FORMAT, "settings": self._settings} | record
        partial = self.folder / f"{_PROGRESS}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / _PROGRESS)
        sync_folder(self.folder)
        self._record = record


@contextmanager
def open_workspace(out: Path, overwrite: bool, settings: dict[str, Any]) -> Iterator[Workspace]:
    """Yield the workspace of `out`, which is locked meanwhile and replaces `out` if the block succeeds.

    If the block fails, the work is removed, unless `keep` was called. A killed process leaves it; the next
    preparation of the same `out` goes on with it, or removes it where there is nothing to go on with.

    Args:
        out: the folder to make.
        overwrite: replace `out`, and begin anew if the work in the folder has other settings.
        settings: JSON of all that decides what is written; work with other settings is not gone on with.

    Raises:
        FileExistsError: `out` must not be replaced, or another process is preparing it, or there is work with
            other settings and `overwrite` is not set.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), out):
        work = Workspace(_folder(target), settings)

        def settle() -> None:
            # The old folder is moved away only once the new one is complete, so the new one may replace it.
            if work.old.exists() and not target.exists():
                work.new.rename(target)

        settle()
        if work.is_renamed and target.exists() and not work.differences():
            yield work  # killed before it could tidy up
            work.clear()
            return
        if work.progress is None or not work.new.is_dir():
            work.clear()
        check_out(out, overwrite)
        if work.progress is not None and (differences := work.differences()):
            if not overwrite:
                raise FileExistsError(
                    f"out {str(out)!r}: an interrupted preparation has other settings: "
                    f"{'; '.join(differences)}. With the old ones it goes on; overwrite starts anew "
                    "(--overwrite)"
                )
            work.clear()
        work.kept = work.progress is not None
        try:
            work.new.mkdir(parents=True, exist_ok=True)
            yield work
            assert work.result is not None, "a block that succeeds calls `complete`"
            if target.exists():
                target.rename(work.old)
            work.new.rename(target)
            sync_folder(target.parent)
            work.kept = False
        finally:
            settle()
            if not work.kept:
                work.clear()


def interrupted_work(out: str | os.PathLike[str]) -> Path | None:
    """Return the hidden folder with the work of a preparation that was interrupted; None if there is none."""
    folder = _folder(Path(out).resolve())
    return folder if _read_record(folder) is not None else None


def check_out(out: Path, overwrite: bool) -> None:
    """Check that `out` may be made.

    Raises:
        FileExistsError: it exists, and is not empty, and is no data folder or `overwrite` is not set.
    """
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


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.preparing")


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / _PROGRESS).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


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
