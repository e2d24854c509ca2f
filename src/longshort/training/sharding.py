"""FSDP2: a model whose weights, gradients and optimizer are cut into shards, one per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from longshort.convolution import ShortConvolution
from longshort.distributed import put_values
from longshort.model import LongShortForCausalLM


def shard(
    model: nn.Module, device: str, world_size: int, shards: int, timeout: timedelta | None = None
) -> None:
    """Cut a `LongShortForCausalLM` into shards, in place: each block by itself, and the rest.

    Gradients are averaged over all processes. A model on the meta device gets memory, not values.

    Args:
        model: the model.
        device: type of the device.
        world_size: number of processes.
        shards: processes among which it is cut; with fewer than all, groups of so many hold copies (HSDP).
        timeout: the timeout of the groups' collectives.
    """
    if shards == world_size:
        mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    else:  # groups that `init_device_mesh` makes have torch's own time-out
        ranks = torch.arange(world_size).view(-1, shards)
        groups = [new_groups(table, timeout) for table in (ranks.T, ranks)]
        mesh = DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("copy", "shard"))
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    inner: Any = model
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_meta:
        model.to_empty(device=device)


def new_groups(table: Tensor, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make a group of the processes of each row; return that of this process. All call it."""
    group, _ = dist.new_subgroups_by_enumeration(table.tolist(), timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def accumulating(objective: nn.Module, is_last: bool) -> Iterator[None]:
    """Exchange gradients only with the last micro-batch of a step."""
    _sharded_model(objective).set_requires_gradient_sync(is_last)
    yield


def reshard(objective: nn.Module) -> None:
    """Give up the whole weights that a forward pass without a backward pass leaves behind."""
    _sharded_model(objective).reshard()


def _sharded_model(objective: nn.Module) -> FSDPModule:
    return next(module for module in objective.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def initialise(model: LongShortForCausalLM, seed: int) -> None:
    """Give a model, cut into shards, the initial weights that one process draws, bit by bit.

    A process draws one whole matrix at a time and keeps its shard.
    """
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            put_values(module.weight, module.identity())
        elif model.initial_std(module) is None:
            model._init_weights(module)
    model.draw_weights(seed)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is cut into shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
