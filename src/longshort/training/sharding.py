"""FSDP2: a model whose weights, gradients and optimizer are cut into shards, one per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from longshort.convolution import ShortConvolution
from longshort.distributed import put_values
from longshort.model import LongShortForCausalLM


def shard(model: nn.Module, device: str, world_size: int, shards: int) -> None:
    """Cut a `LongShortForCausalLM` into shards, in place: each block by itself, and the rest.

    Gradients are averaged over all processes. A model on the meta device gets memory, not values.

    Args:
        model: the model.
        device: type of the device.
        world_size: number of processes.
        shards: processes among which it is cut; with fewer than all, groups of so many hold copies (HSDP).
    """
    shape = (world_size,) if shards == world_size else (world_size // shards, shards)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    inner: Any = model
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_meta:
        model.to_empty(device=device)


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
