"""What all launches of kernels share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longshort.backends.triton.tiles import Tiles, architecture_of, tiles_of


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET is 1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tiles_for(kernel: str, q: Tensor) -> Tiles:
    """Return the sizes for a kernel that serves the query q; small ones for the interpreter."""
    if interpreted():
        return Tiles(16, 16, 1, 1)
    return tiles_of(kernel, q.shape[3], q.dtype, architecture_of(q.device))


def launch(
    kernel: Any, programs: tuple[int, ...], tiles: Tiles, first: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Launch a kernel with the warps and stages of its tiles, on the device of its first argument."""
    with torch.cuda.device_of(first):  # Triton launches on the current one
        kernel[programs](first, *arguments, **constants, **compiler_options(tiles))


def compiler_options(tiles: Tiles) -> dict[str, Any]:
    """Return what a compiler is told beside the arguments.

    It may not fuse products and sums on its own: which ones it fuses depends on what else a kernel computes,
    and statistics would change the last bits of the output.
    """
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}


def precision(q: Tensor) -> str:
    """Return how tensor cores multiply fp32: in three parts of TF32 where torch may use TF32, which AMD has
    not, else not at all."""
    may = q.dtype == torch.float32 and q.is_cuda and torch.version.hip is None
    return "tf32x3" if may and torch.get_float32_matmul_precision() != "highest" else "ieee"


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Give q the sign of the scale: kernels look for the largest product before they scale it."""
    return (-q, -scale) if scale < 0 else (q, scale)


def with_near_channels(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors whose entries of a vector lie so far apart that a 32-bit offset could not reach them."""
    return [x if abs(x.stride(3)) * x.shape[3] < 1 << 31 else x.contiguous() for x in tensors]


def padded(size: int) -> int:
    """Return the size of a block for `size` numbers: a power of two, at least 16 for matrix products."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def table_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers below 2^31 as a tensor on a device, the same tensor each time and for good.

    A copy in every call would take longer than some kernels, and could not be captured in a CUDA graph. The
    tensor is made in another thread, where neither the caller's inference mode applies nor the memory pool of
    a graph that is about to be captured.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, numbers, dtype=torch.int32, device=device).result()
