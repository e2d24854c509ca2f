"""Two processes: a reading holds the maxima and means of both, under DDP and FSDP."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
import torch.distributed as dist
from tests.huggingface.watched_decoders import make_llama, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from longshort.huggingface import LogitMonitor, QKClip

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
own = dist.new_group([0]), dist.new_group([1])


def step(model, watched, seed):
    with LogitMonitor(watched) as both, LogitMonitor(watched, group=own[rank]) as alone:
        model(tokens(seed=seed), labels=tokens(seed=seed), use_cache=False).loss.backward()
    return both.reading(), alone.reading()


def expected(seed):
    model = make_llama()
    with LogitMonitor(model, group=own[rank]) as monitor:
        model(tokens(seed=seed), use_cache=False)
    return monitor.reading()


def check(found, wanted, is_close):
    both, alone = found
    mine, all_of_it = wanted[rank], wanted
    for name, combine in (("max_logit_by_head", torch.amax), ("row_range_by_head", torch.amax),
                          ("entropy_by_head", torch.mean)):
        each = torch.tensor([getattr(reading, name) for reading in all_of_it], dtype=torch.float64)
        tolerance = dict(rtol=1e-5, atol=1e-6) if is_close else dict(rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.tensor(getattr(both, name), dtype=torch.float64), combine(each, 0), **tolerance
        )
        torch.testing.assert_close(
            torch.tensor(getattr(alone, name), dtype=torch.float64), each[rank], **tolerance
        )
    assert both != alone


wanted = [expected(seed) for seed in range(2)]
model = make_llama()
check(step(DistributedDataParallel(model), model, rank), wanted, False)
wrapped = DistributedDataParallel(make_llama())
check(step(wrapped, wrapped, rank), wanted, False)

sharded = make_llama()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
check(step(sharded, sharded, rank), wanted, True)
try:
    QKClip(sharded)
    raise AssertionError
except ValueError as error:
    assert "sharded by FSDP" in str(error), error

# NaN in one process, and a layer that one process alone cannot observe: both must know.
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
try:
    monitor.reading()
    raise AssertionError
except RuntimeError as error:
    assert "layers.1.self_attn ran but was not observed" in str(error), error
dist.destroy_process_group()
"""


def test_two_processes_share_a_reading(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(program)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
