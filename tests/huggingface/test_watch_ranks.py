"""Two processes: a reading holds the maxima and means of both, under DDP and FSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.huggingface.watched_decoders import make_llama, tokens
from tests.processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from longshort.huggingface import LogitMonitor, QKClip
from longshort.stability import Reading


def step(model: Module, watched: Module, seed: int, own: Any) -> tuple[Reading, Reading]:
    with LogitMonitor(watched) as both, LogitMonitor(watched, group=own) as alone:
        model(tokens(seed=seed), labels=tokens(seed=seed), use_cache=False).loss.backward()
    return both.reading(), alone.reading()


def expected(seed: int, own: Any) -> Reading:
    model = make_llama()
    with LogitMonitor(model, group=own) as monitor:
        model(tokens(seed=seed), use_cache=False)
    return monitor.reading()


def check(found: tuple[Reading, Reading], wanted: list[Reading], is_close: bool) -> None:
    both, alone = found
    rtol, atol = (1e-5, 1e-6) if is_close else (1e-12, 0)
    for name, combine in (
        ("max_logit_by_head", torch.amax),
        ("row_range_by_head", torch.amax),
        ("entropy_by_head", torch.mean),
    ):
        each = torch.tensor([getattr(reading, name) for reading in wanted], dtype=torch.float64)
        for reading, values in ((both, combine(each, 0)), (alone, each[dist.get_rank()])):
            mine = torch.tensor(getattr(reading, name), dtype=torch.float64)
            torch.testing.assert_close(mine, values, rtol=rtol, atol=atol)
    assert both != alone


def readings() -> None:
    rank = dist.get_rank()
    own = [dist.new_group([one]) for one in range(2)][rank]
    wanted = [expected(seed, own) for seed in range(2)]
    model = make_llama()
    check(step(DistributedDataParallel(model), model, rank, own), wanted, False)
    wrapped = DistributedDataParallel(make_llama())
    check(step(wrapped, wrapped, rank, own), wanted, False)

    sharded = make_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    check(step(sharded, sharded, rank, own), wanted, True)
    with pytest.raises(ValueError, match="sharded by FSDP"):
        QKClip(sharded)


def test_two_processes_share_a_reading() -> None:
    run_ranks(readings, 2)


def broken_readings() -> None:
    rank = dist.get_rank()
    broken = make_llama()
    with torch.no_grad():
        if rank == 1:
            broken.model.layers[1].self_attn.q_proj.weight[9] = torch.nan
    with LogitMonitor(broken) as monitor:
        broken(tokens(), use_cache=False)
    values = torch.tensor(monitor.reading().max_logit_by_head)
    assert values.isnan().tolist() == [[False] * 4, [False, True, False, False]], values
    if rank == 1:
        broken.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with LogitMonitor(broken) as monitor:
        broken(tokens(), use_cache=False)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn ran but was not observed"):
        monitor.reading()


def test_both_know_what_one_process_found() -> None:
    run_ranks(broken_readings, 2)
