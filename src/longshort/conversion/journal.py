"""A journal of finished measurements, so that interrupted work resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from longshort.reporting.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor, nn

_SAMPLES = 64
_UNRELATED = ("_name_or_path", "transformers_version")  # entries of a config
FORMAT = "longshort journal 1"


class Journal:
    """A file of results by name, each on disk as soon as it is known; use it in a `with` block.

    Args:
        path: the file, one JSON object per line; a new one is made, an existing one continued.
        subject: what the results depend on, as JSON.

    Raises:
        ValueError: the file is of another subject, or no journal.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self._results: dict[str, Any] = {}
        header = {"format": FORMAT, "subject": json.loads(json.dumps(dict(subject)))}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if not lines or lines == [b""]:
            replace_file(path, json.dumps(header).encode() + b"\n")
        else:
            complete = lines[:-1]  # the last line may have been cut off
            self._read(path, complete, header)
            if lines[-1]:
                replace_file(path, b"\n".join([*complete, b""]))
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)

    def __len__(self) -> int:
        return len(self._results)

    def remember(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result of that name; if there is none yet, measure it and write it down."""
        if name not in self._results:
            result = measure()
            self._file.write(json.dumps({"name": name, "result": result}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._results[name] = result
        return self._results[name]

    def knows(self, name: str) -> bool:
        """Return whether there is a result of that name."""
        return name in self._results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, path: Path, lines: list[bytes], header: dict[str, Any]) -> None:
        try:
            first, *others = [json.loads(line) for line in lines]
            held = first["subject"]
            self._results = {entry["name"]: entry["result"] for entry in others}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a journal of measurements, got a line that is none: {error}"
            ) from None
        wanted = header["subject"]
        differing = [key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key)]
        if first.get("format") != FORMAT or differing:
            raise ValueError(
                f"{path} holds measurements with another {', '.join(sorted(differing)) or 'format'}; "
                "choose another folder"
            )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model: of evenly spaced numbers of each parameter and buffer, their shapes, and the
    config, without the place and the version of transformers that it came from."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if len(flat):
            places = torch.arange(_SAMPLES, device=flat.device) * (len(flat) - 1) // (_SAMPLES - 1)
            digest.update(flat[places].double().cpu().numpy().tobytes())
    config: Any = getattr(model, "config", None)
    if config is not None:
        content = {name: value for name, value in config.to_dict().items() if name not in _UNRELATED}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def hash_tokens(tokens: Tensor) -> str:
    """Return a hash of token ids and their shape."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes()).hexdigest()
