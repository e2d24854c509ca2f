"""Devices and processes: one process, or those that `torchrun` started, both behind `Ranks`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longshort.data import Batch
from longshort.distributed import ContextParallel, require_agreement
from longshort.stability.ranks import max_over_ranks, sum_over_ranks
from longshort.training.failures import FailureWatch, meet
from longshort.training.sharding import accumulating, new_groups, shard


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, as seen from one of them.

    `context_size` neighbours share each sequence, so a batch has `data_size` parts, one for each group.

    Attributes:
        device: device of this process.
        rank: number of this process, 0 ... world_size - 1.
        world_size: number of processes.
        context: attention across the processes that share sequences; None if each has whole ones.
        shards: processes among which the model is cut; None if each has a copy.
        saving_group: the processes, for a thread that saves while they train; None if there is none.
        timeout: for which the processes wait for each other; None: torch's own.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    context: ContextParallel | None = field(default=None, compare=False)
    shards: int | None = None
    saving_group: dist.ProcessGroup | None = field(default=None, compare=False)
    timeout: timedelta | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    @property
    def context_size(self) -> int:
        """Number of processes that share a sequence."""
        return 1 if self.context is None else self.context.ranks

    @property
    def data_size(self) -> int:
        """Number of parts of a batch."""
        return self.world_size // self.context_size

    @property
    def data_rank(self) -> int:
        """Number of this process's part of a batch."""
        return self.rank // self.context_size

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Wrap what computes the loss so that gradients are averaged over the ranks in each backward pass; if
        the model in it is cut into shards, it does that itself."""
        if self.world_size == 1 or self.shards is not None:
            return objective
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)

    def shard(self, model: nn.Module) -> None:
        """Cut a model into shards on this process's device, in place; one on the meta device gets memory."""
        assert self.shards is not None
        shard(model, self.device.type, self.world_size, self.shards, self.timeout)

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """Make a context for one micro-batch: gradients are exchanged with the last of a step only."""
        if self.shards is not None:
            return accumulating(model, is_last)
        if isinstance(model, DistributedDataParallel) and not is_last:
            return model.no_sync()
        return nullcontext()

    @contextmanager
    def on_device(self, batch: Batch, *, separate_documents: bool) -> Iterator[tuple[Tensor | None, ...]]:
        """Make a context for the passes of one micro-batch; it gives the arguments of `Objective`.

        Args:
            batch: whole sequences, on the CPU.
            separate_documents: whether documents are kept apart.
        """
        if self.context is None:
            yield tuple(self.put(tensor) for tensor in batch)
            return
        segment_ids = batch.segment_ids if separate_documents else None
        batch_size, length = batch.input_ids.shape
        with self.context.sequence(batch_size, length, segment_ids):
            part = self.context.inputs(batch.input_ids, batch.labels, segment_ids)
            names = ("input_ids", "shift_labels", "segment_ids", "position_ids", "num_items_in_batch")
            yield tuple(self.put(part[name]) if name in part else None for name in names)

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
def connect(
    device: str = "auto",
    *,
    parallel: str = "ddp",
    shards: int | None = None,
    context_parallel: int = 1,
    gather_memory: int | None = None,
    timeout: float = 600.0,
    saves_in_background: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        parallel: "ddp" or "fsdp".
        shards, context_parallel, gather_memory, timeout: as in `TrainConfig`.
        saves_in_background: make `Ranks.saving_group`.
        facts: anything that must be the same in all processes, by name.

    Raises:
        ValueError: "cuda" is asked for and there is none, the number of processes does not fit, or the facts
            differ.
        ChildProcessError: another process failed.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if parallel != "fsdp":
        shards = None
    elif shards is None:
        shards = world_size
    if world_size == 1:
        _check_sizes(1, parallel, shards, context_parallel)
        yield Ranks(_own_device(device))
        return
    wait = timedelta(seconds=timeout)
    store, rank, _ = meet(wait)
    with FailureWatch(store.clone(), rank, world_size):
        _check_sizes(world_size, parallel, shards, context_parallel)
        here = _own_device(device)
        is_gpu = here.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=world_size,
            timeout=wait, device_id=here if is_gpu else None,
        )  # fmt: skip
        everyone: Any = dist.group.WORLD
        require_agreement(facts or {}, everyone, torch.device("cpu"))
        context = None
        if context_parallel > 1:  # batches are a function of seed and step, so the ranks agree
            group = new_groups(torch.arange(world_size).view(-1, context_parallel), wait)
            context = ContextParallel(group, gather_memory=gather_memory, check=False)
        saving: Any = dist.new_group(backend="gloo", timeout=wait) if saves_in_background else None
        ranks = Ranks(here, rank, world_size, context, shards, saving, wait)
        yield ranks
        ranks.barrier()  # a process that exits while others still communicate can make them fail
        dist.destroy_process_group()  # after an error it could wait for others


def _own_device(device: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device: got cuda, but torch sees no CUDA device here; cpu and auto are allowed")
    if device == "cpu" or not has_cuda:
        return torch.device("cpu")
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(here)
    return here


def _check_sizes(world_size: int, parallel: str, shards: int | None, context_parallel: int) -> None:
    if world_size == 1 and (parallel == "fsdp" or context_parallel > 1):
        asked = "--parallel fsdp" if parallel == "fsdp" else f"--context-parallel {context_parallel}"
        raise ValueError(
            f"{asked} needs several processes, got one; start it with "
            "`torchrun --nproc-per-node N -m longshort train ...`"
        )
    for name, value in (("--context-parallel", context_parallel), ("--shards", shards)):
        if value is not None and world_size % value:
            raise ValueError(f"{name} must divide the {world_size} processes, got {value}")
