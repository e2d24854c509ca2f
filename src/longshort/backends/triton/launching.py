"""What all launches of kernels share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longshort.backends.triton.tiles import Tiles


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET is 1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, programs: tuple[int, ...], tiles: Tiles, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with the warps and stages of its tiles."""
    kernel[programs](*arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages)


def precision(q: Tensor) -> str:
    """Return how tensor cores multiply fp32: in three parts of TF32 where torch may use TF32, which AMD has
    not, else not at all."""
    may = q.dtype == torch.float32 and q.is_cuda and torch.version.hip is None
    return "tf32x3" if may and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded(size: int) -> int:
    """Return the size of a block for `size` numbers: a power of two, at least 16 for matrix products."""
    return max(16, 1 << (size - 1).bit_length())


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small table from the host to a device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
