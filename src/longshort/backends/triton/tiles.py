"""Sizes of the kernels' tiles: `longshort bench kernels --compile-only` shows which spill registers."""

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


def tiles_of(
    kernel: str, head_dim: int, dtype: torch.dtype, is_amd: bool = torch.version.hip is not None
) -> Tiles:
    """Return the sizes for a kernel.

    Args:
        kernel: "forward", "grad_q", "grad_kv" or "decode", whose rows are the heads of a group, padded.
        head_dim: entries of a query.
        dtype: of q.
        is_amd: the GPU is one of AMD, not of NVIDIA.
    """
    if kernel in _chosen:
        return _chosen[kernel]
    table = _FP32[kernel] if dtype == torch.float32 else _HALF[kernel]
    limit = next(limit for limit in table if head_dim <= limit)
    return _AMD.get((kernel, limit), table[limit]) if is_amd and table is _HALF[kernel] else table[limit]


@contextmanager
def using(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Let `tiles_of` return these sizes for a kernel."""
    _chosen[kernel] = tiles
    try:
        yield
    finally:
        del _chosen[kernel]


def candidates() -> Iterator[Tiles]:
    """Yield sizes that may be fast, for a search."""
    for rows, keys, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)):
        if rows * keys >= 64 * warps:  # each thread has two scores or more
            yield Tiles(rows, keys, warps, stages)


# By kernel, and the largest head_dim.
_HALF = {
    "forward": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "grad_q": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 32, 8, 1)},
    "grad_kv": {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "decode": {256: Tiles(16, 32, 4, 2)},
}
_AMD = {("grad_kv", 128): Tiles(16, 64, 4, 2)}
_FP32 = {
    "forward": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)},
    "grad_q": {64: Tiles(32, 32, 8, 2), 128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
    "grad_kv": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
    "decode": {128: Tiles(16, 32, 8, 2), 256: Tiles(16, 16, 4, 1)},
}
