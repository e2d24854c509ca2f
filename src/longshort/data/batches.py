"""Batches as a pure function of the seed and the step, so that resuming a run needs no loader state."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longshort.data.token_files import TokenFile

if TYPE_CHECKING:
    from jaxtyping import Int64


class Batch(NamedTuple):
    """Windows of a token file, cut anywhere: one may hold the end of a document and the start of the next."""

    input_ids: Int64[Tensor, "batch sequence"]
    labels: Int64[Tensor, "batch sequence"]
    """Already shifted: `labels[:, t]` is the token after `input_ids[:, t]`."""
    segment_ids: Int64[Tensor, "batch sequence"]
    """The documents inside each window, numbered 0, 1, 2 … in the order in which they come."""


class Batches:
    """Windows of `sequence_length` tokens, and one more for the last label, drawn uniformly with replacement.

    Args:
        token_file: where the tokens come from.
        sequence_length: tokens of one window.
        batch_size: windows of one step, of all ranks together.
        seed: 0 … 2⁶⁴ - 1; each names another sequence of batches.

    Raises:
        ValueError: a number is out of its range, or the file is shorter than one window.
    """

    def __init__(self, token_file: TokenFile, sequence_length: int, batch_size: int, seed: int) -> None:
        _check_integer("batch_size", batch_size, 1)
        _check_integer("seed", seed, 0)
        self._number_of_starts = _number_of_starts(token_file, sequence_length)
        self._token_file = token_file
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Returns the `rank`-th of `world_size` equal, contiguous parts of the batch of `step`.

        Raises:
            ValueError: `step` < 0, `rank` not in 0 … world_size - 1, or batch_size no multiple of world_size.
        """
        _check_integer("step", step, 0)
        _check_integer("world_size", world_size, 1)
        _check_integer("rank", rank, 0, world_size - 1)
        if self._batch_size % world_size:
            raise ValueError(f"batch_size {self._batch_size} must be a multiple of world_size {world_size}")
        # Counter-based and from raw bits: numpy promises the same stream in every version.
        generator = np.random.Philox(key=np.array([self._seed, step], dtype=np.uint64))
        draws = generator.random_raw(self._batch_size) % np.uint64(self._number_of_starts)
        part = self._batch_size // world_size
        starts = draws[rank * part : (rank + 1) * part].astype(np.int64)
        return _windows(self._token_file, starts, self._sequence_length)


def validation_windows(token_file: TokenFile, sequence_length: int, count: int) -> Batch:
    """Returns `count` windows, evenly spaced from the file's first token to its last.

    In a short file they overlap.

    Raises:
        ValueError: `count` or `sequence_length` < 1, or the file is shorter than one window.
    """
    _check_integer("count", count, 1)
    last = _number_of_starts(token_file, sequence_length) - 1
    starts = np.arange(count, dtype=np.int64) * last // max(count - 1, 1)
    return _windows(token_file, starts, sequence_length)


def _windows(token_file: TokenFile, starts: NDArray[np.int64], sequence_length: int) -> Batch:
    every_window = np.lib.stride_tricks.sliding_window_view(token_file.tokens, sequence_length + 1)
    windows = torch.from_numpy(every_window[starts].astype(np.int64))
    positions = starts[:, None] + np.arange(sequence_length)
    documents = np.searchsorted(token_file.document_offsets, positions, side="right")
    segment_ids = torch.from_numpy(documents - documents[:, :1])
    return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), segment_ids)


def _number_of_starts(token_file: TokenFile, sequence_length: int) -> int:
    _check_integer("sequence_length", sequence_length, 1)
    starts = len(token_file) - sequence_length
    if starts < 1:
        raise ValueError(
            f"{token_file.path}.bin has {len(token_file)} tokens; sequence_length {sequence_length} needs "
            f"windows of {sequence_length + 1}: shorten it or take more text"
        )
    return starts


def _check_integer(name: str, value: int, smallest: int, largest: int = 2**64 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise ValueError(f"{name} must be an integer in {smallest} … {largest}, got {value!r}")
