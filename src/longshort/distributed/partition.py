"""The cut of a sequence into equal, contiguous parts, one per rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort.attention import require_tensor
from longshort.checks import require_integer

if TYPE_CHECKING:
    from jaxtyping import Int

PADDING = -1
"""The segment id of a token that is no token: it sees nothing and is not seen."""


def part_length(length: int, ranks: int) -> int:
    """Return the tokens of one part: length / ranks, rounded up, so that the last parts may hold padding.

    Raises:
        ValueError: length < 0, ranks < 1, or one of them is not an integer.
    """
    require_integer("length", length, minimum=0)
    require_integer("ranks", ranks, minimum=1)
    return -(-length // ranks)


def take_part(whole: Tensor, rank: int, ranks: int, *, dim: int = 1, fill: float = 0) -> Tensor:
    """Cut out one rank's part of a tensor along the dimension of the sequence.

    Args:
        whole: any shape and dtype; equal on all ranks.
        rank: 0 ... ranks - 1.
        ranks: number of parts.
        dim: dimension of the sequence.
        fill: value of the padding, where the last part (or parts) would be shorter.

    Returns:
        The rank-th of `ranks` parts, `part_length` long: a view where nothing is padded.

    Raises:
        TypeError: whole is not a tensor.
        ValueError: rank or ranks is out of its range.
    """
    require_tensor("whole", whole)
    length = part_length(whole.shape[dim], ranks)
    require_integer("rank", rank, minimum=0)
    if rank >= ranks:
        raise ValueError(f"rank must be below the {ranks} ranks, got {rank}")
    start = min(rank * length, whole.shape[dim])
    part = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
    missing = length - part.shape[dim]
    if not missing:
        return part
    before = [0, 0] * (whole.ndim - 1 - dim % whole.ndim)
    return F.pad(part, (*before, 0, missing), value=fill)


def join_parts(parts: Sequence[Tensor], length: int, *, dim: int = 1) -> Tensor:
    """Join the parts of all ranks, in their order, and leave out the padding after `length` tokens.

    Raises:
        ValueError: the parts hold fewer tokens.
    """
    whole = torch.cat(list(parts), dim)
    require_integer("length", length, minimum=0)
    if whole.shape[dim] < length:
        raise ValueError(f"length must be at most the {whole.shape[dim]} tokens of the parts, got {length}")
    return whole.narrow(dim, 0, length)


def part_positions(
    length: int, rank: int, ranks: int, device: torch.device | str | None = None
) -> Int[Tensor, "1 part"]:
    """Return the positions of a rank's tokens in the whole sequence, (1, `part_length`), int64.

    Padding counts on, but stays below `length`, so that learned positions have an entry for it.
    """
    part = part_length(length, ranks)
    positions = torch.arange(rank * part, (rank + 1) * part, device=device)
    return positions.clamp(max=max(length - 1, 0))[None]


def padded_segments(
    segment_ids: Int[Tensor, "batch sequence"] | None, batch: int, length: int, ranks: int
) -> Int[Tensor, "batch padded"] | None:
    """Return the segment ids of a sequence with the padding that makes all parts equal; None where nothing
    is padded and there were none."""
    missing = part_length(length, ranks) * ranks - length
    if segment_ids is None:
        if not missing:
            return None
        segment_ids = torch.zeros(batch, length, dtype=torch.int64)
    return F.pad(segment_ids, (0, missing), value=PADDING) if missing else segment_ids
