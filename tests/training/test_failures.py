"""A process that fails ends all of them, soon and with one message."""

from __future__ import annotations

import json
import random
import subprocess
import time
from typing import Any

import psutil
import pytest
from tests.training.runs import SettingsFor, finish, losses, start, start_program, wait_for_step
from tests.training.test_sharding import torchrun

_PROGRAM = """
import json, os, sys, torch
from longshort.training import loop, optimization
from longshort.training.config import TrainConfig

settings, place, failing = TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
calls = 0

def fail(*_arguments):
    global calls
    calls += 1
    if calls == 3 and int(os.environ["RANK"]) == failing:
        raise ArithmeticError(f"planted in {place}")

if place == "forward":
    forward = optimization.Objective.forward
    optimization.Objective.forward = lambda *arguments: (fail(), forward(*arguments))[1]
elif place == "backward":
    forward = optimization.Objective.forward
    def failing_backward(*arguments):
        loss, differentiated = forward(*arguments)
        differentiated.register_hook(fail)
        return loss, differentiated
    optimization.Objective.forward = failing_backward
elif place == "data":
    from longshort.data import Batches
    batch = Batches.batch
    Batches.batch = lambda *arguments: (fail(), batch(*arguments))[1]
elif place == "settings" and int(os.environ["RANK"]) == failing:
    settings = TrainConfig(**{**vars(settings), "learning_rate": 0.25})
loop.train(settings)
"""


@pytest.mark.parametrize(
    ("place", "failing", "changes"),
    [
        ("forward", 1, {"parallel": "fsdp"}),
        ("settings", 1, {}),
        *(
            pytest.param(place, failing, changes, marks=pytest.mark.slow)
            for place in ("forward", "backward", "data")
            for failing in (0, 1)
            for changes in ({}, {"parallel": "fsdp"}, {"context_parallel": 2})
        ),
    ],
)
def test_all_end_when_one_raises(
    place: str, failing: int, changes: dict[str, Any], settings_for: SettingsFor
) -> None:
    settings = settings_for(checkpoint_every=1, **changes)
    arguments = json.dumps(vars(settings), default=str), place, str(failing)
    began = time.monotonic()
    code, output = finish(start_program(_PROGRAM, *arguments, launcher=torchrun(2)))
    assert code != 0
    assert time.monotonic() - began < 60
    if place == "settings":
        assert (
            "--learning-rate must be the same on all ranks, got 0.003 on rank 0 and 0.25 on rank 1" in output
        )
        assert not settings.out.exists()
        return
    assert f"planted in {place}" in output
    if failing:
        assert f"rank 1 failed: ArithmeticError: planted in {place}" in output
    assert {path.name for path in (settings.out / "checkpoints").glob("step-*")} == {"step-1", "step-2"}


def kill_and_resume(
    settings: Any, processes: int, kills: int, choose: random.Random, seconds: tuple[float, float]
) -> int:
    """Kill random processes at random moments, `kills` times, then train to the end; return how many hit."""
    hits = 0
    for _ in range(kills):
        process = start(settings, torchrun(processes))
        if settings.out.exists():
            time.sleep(choose.uniform(*seconds))
        else:
            wait_for_step(process, 2)
            time.sleep(choose.uniform(0, 0.3))
        workers = psutil.Process(process.pid).children()
        if workers:
            choose.choice(workers).kill()
        try:
            hits += process.wait(60) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()
    code, output = finish(start(settings, torchrun(processes)))
    assert code == 0, output
    return hits


@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        (2, {"parallel": "fsdp", "context_parallel": 2, "async_checkpoints": True}),
        pytest.param(20, {"parallel": "fsdp", "async_checkpoints": True}, marks=pytest.mark.slow),
        pytest.param(20, {"parallel": "fsdp"}, marks=pytest.mark.slow),
        pytest.param(20, {"context_parallel": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1200)
def test_killed_processes_resume_bit_by_bit(
    kills: int, changes: dict[str, Any], settings_for: SettingsFor
) -> None:
    steps = 40 if kills < 10 else 400
    every = {"steps": steps, "checkpoint_every": 2, "keep_checkpoints": 2, "evaluate_every": 20}
    whole, broken = settings_for("whole", **every, **changes), settings_for("broken", **every, **changes)
    code, output = finish(start(whole, torchrun(2)))
    assert code == 0, output
    assert kill_and_resume(broken, 2, kills, random.Random(0), (3, 9)) >= min(kills, 2)
    assert losses(broken.out) == losses(whole.out)


def test_one_process_is_not_enough(fails: Any, settings_for: SettingsFor) -> None:
    settings = settings_for()
    base = ("train", "tiny", "--data", settings.data, "--out", settings.out)
    for flags in (("--parallel", "fsdp"), ("--context-parallel", "2")):
        message = fails(1, *base, *flags)
        assert f"{flags[0]} {flags[1]} needs several processes, got one" in message
    for flags, expected in (
        (("--shards", "2"), "--shards goes only with --parallel fsdp, got ddp"),
        (("--async-checkpoints",), "--async-checkpoints goes only with --parallel fsdp, got ddp"),
        (("--gather-memory", "2"), "--gather-memory goes only with --context-parallel, got 2"),
        (("--context-parallel", "2", "--alarms"), "--alarms does not go with --context-parallel"),
        (("--context-parallel", "2", "--probe"), "--probe does not go with --context-parallel"),
        (("--context-parallel", "2", "--compile"), "--compile does not go with --context-parallel"),
    ):
        assert expected in fails(2, *base, *flags)
    assert not settings.out.exists()
