"""Files that are complete or absent: written under another name and then renamed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write `path`, and make its folder; an older file stays until the new one is complete on the disk.

    Raises:
        OSError: the file cannot be written; an older file is untouched then.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # only the owner can read the files of mkstemp
        os.replace(name, path)
    except OSError as error:  # name the file that was asked for, not the hidden one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def require_new_files(*files: Path | None) -> None:
    """Check before any work that nothing is lost when these files are written.

    Raises:
        FileExistsError: one of them exists.
    """
    for file in files:
        if file is not None and file.exists():
            raise FileExistsError(f"{file} exists already; choose another name")


def require_new_folder(folder: Path) -> None:
    """Check before any work that nothing is in a folder that results are written into.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty; choose another name")


def strict_json(content: dict[str, Any]) -> str:
    """Write JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(finite_or_none(content), indent=2, allow_nan=False) + "\n"


def parse_json_line(line: str | bytes, path: Path, number: int, key: str) -> dict[str, Any]:
    """Parse the object on a line of a JSONL file, which holds at least `key`.

    Raises:
        ValueError: there is no such object; the message names the file and the line's number.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"{path}, line {number}: not an object with a {key}")
    return record


def finite_or_none(value: Any) -> Any:
    """Copy dictionaries and lists with None for each number that is not finite."""
    if isinstance(value, dict):
        return {name: finite_or_none(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
