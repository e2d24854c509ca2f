"""Sizes of the kernels' tiles: what does not spill registers, by `longshort bench kernels --compile-only`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows, keys: of a tile of scores.
        warps: of a program.
        stages: loads that are under way at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int


_chosen: dict[str, Tiles] = {}


def tiles_of(kernel: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return the sizes for a kernel: "forward", "grad_q" or "grad_kv"."""
    if kernel in _chosen:
        return _chosen[kernel]
    wide = 2 if dtype == torch.float32 else 1  # numbers of twice the bytes fill registers twice as fast
    size = max(16, 1 << (head_dim - 1).bit_length()) * wide
    table = _TABLE[kernel]
    return next(tiles for limit, tiles in table if size <= limit)


@contextmanager
def using(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Let `tiles_of` return these sizes for a kernel."""
    _chosen[kernel] = tiles
    try:
        yield
    finally:
        del _chosen[kernel]


def candidates() -> Iterator[Tiles]:
    """Yield the sizes among which those of the table were searched, or are to be."""
    for rows, keys, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)):
        if rows * keys >= 64 * warps:  # each thread has two scores or more
            yield Tiles(rows, keys, warps, stages)


_TABLE = {
    "forward": (
        (64, Tiles(64, 64, 4, 3)),
        (128, Tiles(128, 64, 8, 3)),
        (256, Tiles(64, 32, 8, 2)),
        (512, Tiles(32, 32, 8, 1)),
    ),
    "grad_q": (
        (64, Tiles(64, 64, 4, 2)),
        (128, Tiles(64, 64, 4, 2)),
        (256, Tiles(32, 32, 8, 1)),
        (512, Tiles(16, 32, 8, 1)),
    ),
    "grad_kv": (
        (64, Tiles(64, 64, 4, 2)),
        (128, Tiles(32, 64, 4, 2)),
        (256, Tiles(32, 32, 8, 1)),
        (512, Tiles(32, 16, 8, 1)),
    ),
}
