"""Devices and processes: one process, or data parallelism under `torchrun`, both behind `Ranks`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longshort.stability.ranks import max_over_ranks, sum_over_ranks


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, as seen from one of them.

    Attributes:
        device: device of this process.
        rank: number of this process, 0 ... world_size - 1.
        world_size: number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that its gradients are averaged over the ranks in each backward pass."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """Make a context for one micro-batch: gradients are exchanged with the last of a step only."""
        if isinstance(model, DistributedDataParallel) and not is_last:
            return model.no_sync()
        return nullcontext()

    def put(self, values: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting for a GPU."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)  # from other memory a copy waits

    def wait(self) -> None:
        """Wait until the device has done what it was given; a CPU has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Compute the sum over the ranks, element by element."""
        if self.world_size == 1:
            return values
        return sum_over_ranks(values)

    def reduce_mean(self, values: Tensor) -> Tensor:
        """Compute the mean over the ranks, element by element."""
        return self.reduce_sum(values) / self.world_size

    def reduce_max(self, values: Tensor) -> Tensor:
        """Compute the maximum over the ranks, element by element; NaN where any rank has a NaN."""
        if self.world_size == 1:
            return values
        return max_over_ranks(values)

    def any(self, condition: bool) -> bool:
        """Return whether the condition holds on at least one rank: CPUs tell each other, no GPU is waited
        for."""
        if self.world_size == 1:
            return condition
        return bool(self.reduce_sum(torch.tensor(float(condition))) > 0)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def connect(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ValueError: "cuda" is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device: got cuda, but torch sees no CUDA device here; cpu and auto are allowed")
    kind = ("cuda" if has_cuda else "cpu") if device == "auto" else device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    here = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks(here)
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=here if kind == "cuda" else None)
    try:
        ranks = Ranks(here, dist.get_rank(), world_size)
        yield ranks
        ranks.barrier()  # a process that exits while others still communicate can make them fail
    finally:
        dist.destroy_process_group()
