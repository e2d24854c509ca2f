"""Two processes train what one does."""

import math
import signal

import psutil
import pytest
import torch
from tests.processes import run_processes
from tests.training.runs import (
    SettingsFor,
    assert_close_metrics,
    finish,
    start,
    torchrun,
    wait_for_step,
    without_speed,
)

from longshort.training.checkpoints import latest_checkpoint
from longshort.training.loop import resume, train
from longshort.training.parallel import Ranks, connect


def test_two_processes_train_what_one_does(settings_for: SettingsFor) -> None:
    changes = {"steps": 8, "batch_size": 6, "validation_windows": 5, "z_loss": 0.1}
    changes |= {"qk_learning_rate_factor": 0.1}
    alone = settings_for("alone", **changes)
    together = settings_for("together", micro_batch_size=2, **changes)  # 2 + 1 on each of them
    train(alone)
    code, output = finish(start(together, torchrun(2)))
    assert code == 0, output
    assert_close_metrics(together.out, alone.out, rel=1e-5)
    assert output.count("step 8\n") == 1
    assert sorted(path.name for path in (together.out / "checkpoints").iterdir()) == ["step-5", "step-8"]
    assert resume(together.out, steps=10).step == 10  # on another number of processes
    resume(alone.out, steps=10)
    assert_close_metrics(together.out, alone.out, rel=1e-5)


def reduce_on_two() -> None:
    with connect("cpu") as ranks:
        values = torch.tensor([[1.0, 5.0, math.nan, math.inf], [3.0, 2.0, 4.0, -math.inf]][ranks.rank])
        assert ranks.world_size == 2
        assert ranks.is_main == (ranks.rank == 0)
        assert str(ranks.reduce_max(values).tolist()) == "[3.0, 5.0, nan, inf]"
        assert ranks.reduce_sum(values)[:2].tolist() == [4.0, 7.0]
        assert ranks.reduce_mean(values)[:2].tolist() == [2.0, 3.5]
        assert values[0] == [1.0, 3.0][ranks.rank]
        assert ranks.any(ranks.rank == 1)
        assert not ranks.any(False)
        linear = torch.nn.Linear(1, 1, bias=False)
        model = ranks.wrap(linear)
        for is_last in (False, True):
            with ranks.accumulating(model, is_last):
                model(torch.tensor([[1.0 + ranks.rank]])).sum().backward()
            assert linear.weight.grad is not None
            gradient = linear.weight.grad.item()
            assert gradient == (3.0 if is_last else 1.0 + ranks.rank), (is_last, gradient)
        ranks.barrier()
    assert not torch.distributed.is_initialized()


def test_reductions_join_two_processes() -> None:
    run_processes(reduce_on_two, 2)


@pytest.mark.slow
def test_two_processes_killed_and_stopped_go_on_bit_by_bit(settings_for: SettingsFor) -> None:
    whole, broken = settings_for("whole", steps=300), settings_for("broken", steps=300)
    code, output = finish(start(whole, torchrun(2)))
    assert code == 0, output

    process = start(broken, torchrun(2))
    wait_for_step(process, 7)
    psutil.Process(process.pid).children()[-1].kill()  # torchrun ends the other one
    assert finish(process)[0] != 0

    process = start(broken, torchrun(2))
    wait_for_step(process, 20)
    process.send_signal(signal.SIGINT)
    _, output = finish(process)
    assert "torchrun --nproc-per-node 2 -m longshort train --resume" in output
    latest = latest_checkpoint(broken.out)
    assert latest is not None
    assert f"stopped after {latest.name.replace('-', ' ')}" in output

    code, output = finish(start(broken, torchrun(2)))
    assert code == 0, output
    assert without_speed(broken.out) == without_speed(whole.out)


@pytest.mark.slow
def test_batch_that_does_not_divide_is_refused(settings_for: SettingsFor) -> None:
    settings = settings_for(batch_size=3)
    code, output = finish(start(settings, torchrun(2)))
    assert code != 0
    assert "--batch-size must be a multiple of the 2 processes, got 3" in output
    assert not settings.out.exists()


def test_alone_nothing_is_wrapped_or_reduced() -> None:
    with connect("cpu") as ranks:
        assert ranks == Ranks(torch.device("cpu"), 0, 1)
        model = torch.nn.Linear(1, 1)
        values = torch.tensor([1.0, float("nan")])
        assert ranks.is_main
        assert ranks.wrap(model) is model
        assert ranks.reduce_max(values) is values
        assert ranks.reduce_mean(torch.tensor([2.0])).tolist() == [2.0]
        assert ranks.any(True)
        assert not ranks.any(False)
        ranks.barrier()
        with ranks.accumulating(model, is_last=False):
            pass


def test_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(ValueError, match="--device: got cuda, but torch sees no CUDA device"),
        connect("cuda"),
    ):
        pass
    with connect("auto") as ranks:
        assert ranks.device == torch.device("cpu")
