"""Batches as a pure function of the seed and the step, so that resuming a run needs no loader state.

Two orders of the tokens other than the text's are for control experiments: the tokens depend on one another
as in the text, but not on their neighbours.

- "permuted": the tokens of each window are put into one random order, the same for all windows of a length.
- "interleaved": a window is woven of pieces of text from independent places, token t from piece t mod pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longshort.data.documents import DocumentStart, begins_with_end_of_text, document_segments
from longshort.data.token_files import TokenFile

if TYPE_CHECKING:
    from jaxtyping import Int64


TokenOrder = Literal["text", "permuted", "interleaved"]
"""The order of the tokens in a window; see the description of this module."""

_PERMUTATION_SEED = 20_240


class Batch(NamedTuple):
    """Windows of a token file, cut anywhere: one may hold the end of a document and the start of the next."""

    input_ids: Int64[Tensor, "batch sequence"]
    labels: Int64[Tensor, "batch sequence"]
    """Already shifted: `labels[:, t]` is the token after `input_ids[:, t]`."""
    segment_ids: Int64[Tensor, "batch sequence"]
    """The documents inside each window, numbered 0, 1, 2 … in order, each from where `DocumentStart` says.
    All are 0 if the tokens are not in the text's order."""


class Batches:
    """Windows of `sequence_length` tokens, and one more for the last label, drawn uniformly with replacement.

    Args:
        token_file: the file that windows are cut from.
        sequence_length: tokens of one window.
        batch_size: windows of one step, of all ranks together.
        seed: 0 … 2⁶⁴ - 1; each names another sequence of batches.
        token_order: "text", or one of the other orders that this module's description explains.
        interleave: pieces per interleaved window, 1 … sequence_length; their places are drawn independently.
        document_start: where the segment of a document begins.

    Raises:
        ValueError: a value is out of its range, or the file is shorter than one window (one piece).
    """

    def __init__(
        self,
        token_file: TokenFile,
        sequence_length: int,
        batch_size: int,
        seed: int,
        *,
        token_order: TokenOrder = "text",
        interleave: int = 16,
        document_start: DocumentStart = "at-end-of-text",
    ) -> None:
        _check_integer("batch_size", batch_size, 1)
        _check_integer("seed", seed, 0)
        self._windows = _Windows(token_file, sequence_length, token_order, interleave, document_start)
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the `rank`-th of `world_size` equal, contiguous parts of the batch of `step`.

        Raises:
            ValueError: `step` < 0, `rank` not in 0 … world_size - 1, or batch_size not a multiple of
                world_size.
        """
        _check_integer("step", step, 0)
        _check_integer("world_size", world_size, 1)
        _check_integer("rank", rank, 0, world_size - 1)
        if self._batch_size % world_size:
            raise ValueError(f"batch_size {self._batch_size} must be a multiple of world_size {world_size}")
        # Counter-based and from raw bits: numpy promises the same stream in every version.
        generator = np.random.Philox(key=np.array([self._seed, step], dtype=np.uint64))
        windows = self._windows
        draws = generator.random_raw(self._batch_size * windows.pieces) % np.uint64(windows.number_of_starts)
        part = self._batch_size // world_size
        starts = draws.astype(np.int64).reshape(self._batch_size, windows.pieces)
        return windows.cut(starts[rank * part : (rank + 1) * part])


def validation_windows(
    token_file: TokenFile,
    sequence_length: int,
    count: int,
    *,
    token_order: TokenOrder = "text",
    interleave: int = 16,
    document_start: DocumentStart = "at-end-of-text",
) -> Batch:
    """Return `count` windows, evenly spaced from the file's first token to its last.

    In a short file they overlap. Interleaved pieces are evenly spaced too, those of one window far apart. The
    order of tokens and the numbers of documents are those of `Batches` with the same sequence_length.

    Raises:
        ValueError: `count` < 1, or as for `Batches`.
    """
    _check_integer("count", count, 1)
    windows = _Windows(token_file, sequence_length, token_order, interleave, document_start)
    pieces = count * windows.pieces
    starts = np.arange(pieces, dtype=np.int64) * (windows.number_of_starts - 1) // max(pieces - 1, 1)
    return windows.cut(starts.reshape(windows.pieces, count).T)


def copying_windows(token_file: TokenFile, sequence_length: int, count: int, seed: int = 0) -> Batch:
    """Return `count` sequences whose second half repeats the first: tokens drawn one by one from the file.

    The labels that count are the tokens of the second half, which only copying can predict, after the first
    of them; the others are -100.

    Raises:
        ValueError: sequence_length < 4, count < 1, or seed < 0.
    """
    _check_integer("sequence_length", sequence_length, 4)
    _check_integer("count", count, 1)
    _check_integer("seed", seed, 0)
    half = sequence_length // 2
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    places = generator.random_raw(count * half) % np.uint64(len(token_file.tokens))
    drawn = token_file.tokens[places.astype(np.int64)].astype(np.int64).reshape(count, half)
    tokens = torch.from_numpy(np.concatenate([drawn, drawn, drawn[:, :1]], axis=1))
    labels = tokens[:, 1 : 2 * half + 1].clone()
    labels[:, : half - 1] = -100
    labels[:, -1] = -100
    return Batch(tokens[:, : 2 * half], labels, torch.zeros_like(labels))


class _Windows:
    """Cuts windows out of a token file, each of `pieces` pieces, and puts their tokens in order."""

    def __init__(
        self,
        token_file: TokenFile,
        sequence_length: int,
        token_order: TokenOrder,
        interleave: int,
        document_start: DocumentStart,
    ) -> None:
        _check_integer("sequence_length", sequence_length, 1)
        if token_order not in get_args(TokenOrder):
            raise ValueError(
                f"token_order must be one of {', '.join(get_args(TokenOrder))}, got {token_order!r}"
            )
        if token_order == "interleaved":
            _check_integer("interleave", interleave, 1, sequence_length)
        begins_with_end_of_text(document_start)  # checks it
        self.pieces = interleave if token_order == "interleaved" else 1
        self._token_file = token_file
        self._sequence_length = sequence_length
        self._token_order = token_order
        self._document_start: DocumentStart = document_start
        self._piece_length = -(-(sequence_length + 1) // self.pieces)
        self.number_of_starts = len(token_file) - self._piece_length + 1
        if self.number_of_starts < 1:
            raise ValueError(
                f"{token_file.path}.bin has {len(token_file)} tokens; sequence_length {sequence_length} "
                f"needs {'windows' if self.pieces == 1 else 'pieces'} of {self._piece_length}: shorten it or "
                "take more text"
            )

    def cut(self, starts: NDArray[np.int64]) -> Batch:
        """Cut the windows whose pieces start at `starts`: (windows, pieces)."""
        length = self._sequence_length
        every_piece = np.lib.stride_tricks.sliding_window_view(self._token_file.tokens, self._piece_length)
        woven = every_piece[starts].astype(np.int64).swapaxes(1, 2).reshape(len(starts), -1)[:, : length + 1]
        if self._token_order == "permuted":
            woven = woven[:, _permutation(length + 1)]
        windows = torch.from_numpy(woven)
        if self._token_order == "text":
            segments = document_segments(
                self._token_file.document_offsets, starts + np.arange(length), self._document_start
            )
            segment_ids = torch.from_numpy(segments - segments[:, :1])
        else:
            segment_ids = torch.zeros(len(starts), length, dtype=torch.int64)
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), segment_ids)


def _permutation(size: int) -> NDArray[np.int64]:
    """Return one random order of 0 … size - 1; drawn from raw bits, as the batches are."""
    bits = np.random.Philox(key=np.array([_PERMUTATION_SEED, size], dtype=np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def _check_integer(name: str, value: int, smallest: int, largest: int = 2**64 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise ValueError(f"{name} must be an integer in {smallest} … {largest}, got {value!r}")
