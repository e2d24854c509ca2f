"""Values of parameters that FSDP2 has cut into shards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def put_values(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's shard of it into its shard, bit by bit.

    Args:
        parameter: a tensor, or a `DTensor` of which this process holds a shard.
        values: the values of the whole shape, equal on all processes, on any device.
    """
    if isinstance(parameter, DTensor):
        place = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device), *place, src_data_rank=None)  # nothing is sent
    parameter.copy_(values)
