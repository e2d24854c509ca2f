"""Measurements over the processes of a training, and weights that are cut into shards among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def max_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute the maximum over processes, element by element; NaN where one of them has a NaN.

    Args:
        values: floating numbers, of one shape everywhere, on a device that the group's backend serves.
        group: the processes; None: all.
    """
    is_nan = values.isnan()  # whether a collective's MAX keeps NaN is up to its library
    both = torch.stack([values.detach().masked_fill(is_nan, -torch.inf), is_nan.to(values.dtype)])
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    return both[0].masked_fill(both[1] > 0, torch.nan)


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute the sum over processes, element by element; the arguments are those of `max_over_ranks`."""
    total = values.detach().clone()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this process holds, as a view, and the number of the first of them.

    An ordinary tensor is held whole. An operation on a slice of a `DTensor`, as FSDP2 makes it, would change
    a copy.

    Raises:
        ValueError: the tensor is sharded in another way.
    """
    to_local: Any = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor, 0
    sharded: Any = tensor
    start, count = 0, sharded.shape[0]
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0):
            raise ValueError(f"tensor must be replicated or sharded by rows, got {sharded.placements}")
        # As torch.chunk splits: equal parts, but for the last ones, which may be smaller or empty.
        size = -(-count // sharded.device_mesh.size(dimension))
        before = min(count, size * sharded.device_mesh.get_local_rank(dimension))
        start, count = start + before, min(size, count - before)
    local = to_local()
    assert len(local) == count
    return local, start


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from all processes if it is sharded: all of them must call this."""
    full_tensor: Any = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
