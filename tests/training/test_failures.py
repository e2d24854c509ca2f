"""A process that fails ends all of them, soon and with one message."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.training.runs import SettingsFor, finish, losses, start, start_program, torchrun, train_together

from longshort.training.config import TrainConfig

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
        raise {"data": OSError, "backward": ArithmeticError}.get(place, RuntimeError)(f"planted in {place}")

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
    assert output.count(f"planted in {place}") == 1
    if failing:
        assert re.search(rf"rank 1 failed: \w+: planted in {place}", output)
    assert {path.name for path in (settings.out / "checkpoints").glob("step-*")} == {"step-1", "step-2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "taken"], "taken exists already"),
        *(
            pytest.param(["--out", "run", *arguments], message, marks=pytest.mark.slow)
            for arguments, message in (
                (["--steps", "0"], "--steps must be"),
                (["--shards", "3"], "goes only with --parallel fsdp"),
                (["--context-parallel", "3"], "must divide the 2 processes, got 3"),
                (["--device", "cuda"], "got cuda, but torch sees no CUDA device"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_all_find_is_printed_once(
    arguments: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    monkeypatch.chdir(tmp_path)
    command = [*torchrun(2), sys.executable, "-m", "longshort", "train", "tiny", "--data", str(data)]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode
    assert result.stderr.count(message) == 1, result.stderr
    assert not (tmp_path / "run").exists()


def kill_and_resume(settings: TrainConfig, processes: int, kills: int, choose: random.Random) -> None:
    """Kill random processes at random moments, `kills` times, then train to the end."""
    for _ in range(kills):
        process = start(settings, torchrun(processes))
        assert process.stdout is not None
        wait_for_lines(process, choose.randint(1, 15))
        time.sleep(choose.uniform(0, 0.3))  # in a step, or while a checkpoint is saved
        choose.choice(psutil.Process(process.pid).children()).kill()
        ends = threading.Timer(60, process.kill)  # then the code is that of the signal
        ends.start()
        code, output = finish(process)
        ends.cancel()
        assert code == 1, output
    train_together(settings, processes, seconds=400)


def wait_for_lines(process: subprocess.Popen[str], count: int) -> None:
    """Read what the processes print until they have taken a number of steps."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        count -= line.startswith("step ")
        if not count:
            return
    raise AssertionError(f"the processes ended before: {''.join(printed)}")


@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        (1, {"parallel": "fsdp", "context_parallel": 2, "async_checkpoints": True}),
        pytest.param(20, {"parallel": "fsdp", "async_checkpoints": True}, marks=pytest.mark.slow),
        pytest.param(20, {"parallel": "fsdp"}, marks=pytest.mark.slow),
        pytest.param(20, {"context_parallel": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1200)
def test_killed_processes_resume_bit_by_bit(
    kills: int, changes: dict[str, Any], settings_for: SettingsFor
) -> None:
    steps = 40 if kills < 10 else 500
    every = {"steps": steps, "checkpoint_every": 2, "keep_checkpoints": 2, "evaluate_every": 20}
    whole, broken = settings_for("whole", **every, **changes), settings_for("broken", **every, **changes)
    train_together(whole, 2, seconds=400)
    kill_and_resume(broken, 2, kills, random.Random(0))
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
