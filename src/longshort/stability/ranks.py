"""Maxima and sums of measurements over the processes of a training."""

from __future__ import annotations

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
