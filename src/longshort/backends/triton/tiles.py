"""Sizes of the kernels' tiles: `longshort bench kernels --compile-only` shows which spill registers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows, keys: of a tile of scores.
        warps: the number of warps of a program.
        stages: loads that are under way at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int


_chosen: dict[str, Tiles] = {}


@lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> str:
    """Return the entry of the table below that a GPU is like: of those with as much shared memory."""
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(capability, "sm89")


def tiles_of(kernel: str, head_dim: int, dtype: torch.dtype, architecture: str) -> Tiles:
    """Return the sizes for a kernel on a GPU.

    Args:
        kernel: "forward", "delta", "grad_q", "grad_kv"; "decode", whose rows are the heads of a group,
            padded; or "merge", which has no tiles.
        head_dim: entries of a query.
        dtype: the dtype of q.
        architecture: sm80 (A100), sm89 (Ada, and others with 99 KiB of shared memory for a program), sm90
            (H100, H200), sm100 (B200) or gfx942 (MI300, and other GPUs of AMD).
    """
    if kernel in _chosen:
        return _chosen[kernel]
    name = "fp32" if dtype == torch.float32 else "half"
    table = _TILES[name][kernel]
    limit = next(limit for limit in table if head_dim <= limit)
    return _EXCEPTIONS.get((architecture, name, kernel, limit), table[limit])


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


# By kernel, and the largest head_dim: sizes that spill no registers.
# `longshort bench kernels` times others.
_TILES = {
    "half": {
        "forward": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        "grad_q": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        "grad_kv": {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        "decode": {64: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)},
        "delta": {256: Tiles(64, 0, 4, 1)},
        "merge": {256: Tiles(0, 0, 4, 1)},
    },
    "fp32": {
        "forward": {64: Tiles(64, 32, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 32, 8, 1)},
        "grad_q": {64: Tiles(32, 32, 8, 2), 128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
        "grad_kv": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
        "decode": {64: Tiles(16, 16, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 4, 1)},
        "delta": {256: Tiles(64, 0, 4, 1)},
        "merge": {256: Tiles(0, 0, 4, 1)},
    },
}
_EXCEPTIONS = {
    ("sm100", "half", "grad_kv", 128): Tiles(32, 32, 4, 2),
    ("gfx942", "half", "grad_q", 128): Tiles(64, 64, 4, 2),
    ("gfx942", "half", "grad_kv", 128): Tiles(16, 64, 4, 2),
}
