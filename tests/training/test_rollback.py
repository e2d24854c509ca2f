"""Spikes in training: reported, stopped at, rolled back from, and none of it lost by an interrupt."""

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import (
    Recorder,
    SettingsFor,
    finish,
    losses,
    start,
    torchrun,
    without_speed,
)

from longshort.data import Batch, Batches
from longshort.stability import Spike, SpikeDetector
from longshort.training import checkpoints
from longshort.training.checkpoints import TrainState, checkpoint_steps
from longshort.training.loop import resume, train
from longshort.training.metrics import MetricsLog, read_metrics
from longshort.training.plots import plot_run
from longshort.training.report import write_report
from longshort.training.rollback import checkpoints_to_keep, describe, good_checkpoint, respond

BAD = 15
"""The batch of step 16 predicts one rare byte everywhere."""


@pytest.fixture(autouse=True)
def quick_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows what is usual after 5 steps."""
    quick = partial(SpikeDetector, window=10, loss_score=2.0)
    monkeypatch.setattr("longshort.training.loop.SpikeDetector", quick)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Spoil some batches; gives the list of the numbers of all batches that were taken."""
    draw = Batches.batch

    def spoil(*bad: int) -> list[int]:
        taken: list[int] = []

        def batch(self: Batches, step: int, *ranks: int) -> Batch:
            taken.append(step)
            drawn = draw(self, step, *ranks)
            return drawn._replace(labels=torch.full_like(drawn.labels, 7)) if step in bad else drawn

        monkeypatch.setattr(Batches, "batch", batch)
        return taken

    return spoil


def spiky(settings_for: SettingsFor, name: str = "run", **changes: Any) -> Any:
    defaults = {
        "learning_rate": 1e-2, "evaluate_every": 0, "tensorboard": False,
        "steps": 24, "checkpoint_every": 4, "on_spike": "rollback", "rollback_steps": 3, "skip_batches": 6
    }  # fmt: skip
    return settings_for(name, **{**defaults, **changes})


def spikes(run: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = read_metrics(run, abandoned=True)
    return [(line["step"], line["spike"]) for line in lines if "spike" in line]


def test_a_normal_run_has_no_spike(settings_for: SettingsFor) -> None:
    plain, watched = settings_for("plain", steps=80), settings_for("watched", steps=80, on_spike="stop")
    train(plain)
    assert train(watched).exit_code == 0
    assert without_speed(watched.out) == without_speed(plain.out)


def test_a_spike_is_reported_in_a_line_of_its_own(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    plant(BAD)
    plain = spiky(settings_for, "plain", on_spike=None)
    watched = spiky(settings_for, "watched", on_spike="report", log_every=5)
    train(plain)
    recorder = Recorder()
    assert train(watched, recorder).exit_code == 0
    ((step, spike),) = spikes(watched.out)
    assert (step, spike["onset"], spike["action"]) == (16, 16, "report")
    assert spike["reasons"][0].startswith("loss ")
    (message,) = recorder.messages
    assert message.startswith("spike at step 16: loss ") and message.endswith("; the run continues")
    logged = {line["step"]: line["loss"] for line in read_metrics(watched.out)}
    assert 16 in logged and 17 not in logged
    assert all(losses(plain.out)[step - 1] == loss for step, loss in logged.items())


def test_a_spike_stops_the_run_which_can_go_on(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    plant(BAD)
    reported, stopped = (spiky(settings_for, action, on_spike=action) for action in ("report", "stop"))
    train(reported)
    recorder = Recorder()
    outcome = train(stopped, recorder)
    assert (outcome.step, outcome.signal, outcome.stopped_by_spike, outcome.exit_code) == (16, None, True, 3)
    assert checkpoint_steps(stopped.out)[-1] == 16
    assert recorder.messages[0].endswith("; stopping; a checkpoint is written first")
    assert recorder.messages[1].startswith("stopped after step 16; to resume: longshort train --resume ")
    assert resume(stopped.out).exit_code == 0
    assert losses(stopped.out) == losses(reported.out)


def test_a_rollback_leaves_out_the_batches_of_the_spike(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    taken = plant(BAD)
    settings = spiky(settings_for)
    recorder = Recorder()
    outcome = train(settings, recorder)
    assert (outcome.step, outcome.exit_code) == (24, 0)
    # Step 12 is the last checkpoint at least 3 steps before 16; 6 batches are left out from there on.
    assert taken == [*range(16), *range(18, 30)]
    ((step, spike),) = spikes(settings.out)
    assert (step, spike["action"], spike["to_step"], spike["batches_skipped"]) == (16, "rollback", 12, 6)
    assert recorder.messages[0].endswith(
        "; back to step 12, 6 batches are left out (rollback 1 of at most 5)"
    )
    lines = read_metrics(settings.out)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line.get("attempt", 0) for line in lines] == [0] * 12 + [1] * 12
    every_line = read_metrics(settings.out, abandoned=True)
    assert [line["step"] for line in every_line] == [*range(1, 17), *range(13, 25)]
    assert every_line[15]["loss"] > max(line["loss"] for line in lines[3:])
    assert lines[-1]["tokens"] == 24 * 4 * 48
    assert checkpoint_steps(settings.out) == [0, 4, 8, 12, 16, 20, 24]


def test_after_a_rollback_the_run_is_that_of_the_other_batches(
    settings_for: SettingsFor, plant: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BAD)
    rolled_back = spiky(settings_for, gradient_checkpointing=True)
    train(rolled_back)
    batch = Batches.batch
    later: Callable[..., Batch] = lambda self, step, *ranks: batch(self, step + 6 * (step >= 12), *ranks)  # noqa: E731
    monkeypatch.setattr(Batches, "batch", later)
    expected = spiky(settings_for, "expected", on_spike=None)
    train(expected)
    assert losses(rolled_back.out) == losses(expected.out)


def test_at_least_the_batches_up_to_the_spike_are_left_out(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    taken = plant(BAD)
    train(spiky(settings_for, skip_batches=0))
    assert taken == [*range(16), *range(16, 28)]


def test_without_an_older_checkpoint_it_goes_back_to_the_first_step(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    taken = plant(BAD)
    settings = spiky(settings_for, rollback_steps=100)
    assert train(settings).exit_code == 0
    assert taken == [*range(16), *range(16, 40)]
    assert checkpoint_steps(settings.out)[0] == 0


def test_spikes_again_and_again_stop_the_run(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    plant(*range(BAD, 100))
    settings = spiky(settings_for, max_rollbacks=1)
    recorder = Recorder()
    outcome = train(settings, recorder)
    assert outcome.stopped_by_spike
    assert [spike["action"] for _, spike in spikes(settings.out)] == ["rollback", "stop"]
    assert "; stopping, --max-rollbacks 1 is reached; a checkpoint" in recorder.messages[1]


class Breaker(Recorder):
    """Ends its process after the n-th step that it is told of: by a wish, or at once."""

    def __init__(self, count: int, signals: int) -> None:
        super().__init__()
        self._count, self._signals = count, signals

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        super().on_step(step, record)
        if len(self.steps) == self._count:
            for _ in range(self._signals):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("signals", [1, 2], ids=["stopped", "killed"])
@pytest.mark.parametrize("count", [3, 14, 16, 17, 27])
@pytest.mark.parametrize(
    ("keep", "rollback_steps"),
    [(1, 10), *(pytest.param(*some, marks=pytest.mark.slow) for some in ((None, 3), (3, 10)))],
)
def test_an_interrupt_changes_no_decision(
    settings_for: SettingsFor,
    plant: Callable[..., list[int]],
    keep: int | None,
    rollback_steps: int,
    count: int,
    signals: int,
) -> None:
    plant(BAD, 24)
    whole = spiky(settings_for, "whole", rollback_steps=rollback_steps)  # keeps all checkpoints
    broken = spiky(settings_for, "broken", rollback_steps=rollback_steps, keep_checkpoints=keep)
    train(whole)
    assert len(spikes(whole.out)) == 2
    if signals == 1:
        assert train(broken, Breaker(count, signals)).exit_code == 130
    else:
        with pytest.raises(KeyboardInterrupt):
            train(broken, Breaker(count, signals))
    assert resume(broken.out).step == 24
    every_line = [read_metrics(run.out, abandoned=True) for run in (whole, broken)]
    for lines in every_line:
        for line in lines:
            del line["tokens_per_second"]
    assert every_line[1] == every_line[0]


@pytest.mark.parametrize("where", ["_remove", "replace_file"])
def test_killed_in_a_rollback(
    settings_for: SettingsFor,
    plant: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    plant(BAD)
    whole, broken = (spiky(settings_for, name, rollback_steps=6) for name in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(checkpoints, where, killed)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert spikes(broken.out) == spikes(whole.out)
    assert checkpoint_steps(broken.out)[-1] == 12  # the spike's own checkpoint is not written
    resume(broken.out)
    assert without_speed(broken.out) == without_speed(whole.out)
    assert checkpoint_steps(broken.out) == checkpoint_steps(whole.out)


@pytest.mark.parametrize(
    ("rise_steps", "kept"), [(20, [0, 4, 8, 12, 16, 20, 24]), (2, [20, 24])], ids=["early", "late"]
)
@pytest.mark.parametrize("rollback_steps", [3, 100])
def test_checkpoints_to_go_back_to_are_kept(
    settings_for: SettingsFor,
    plant: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    rise_steps: int,
    kept: list[int],
    rollback_steps: int,
) -> None:
    quick = partial(SpikeDetector, window=10, loss_score=2.0, rise_steps=rise_steps)
    monkeypatch.setattr("longshort.training.loop.SpikeDetector", quick)
    plant(BAD)
    every = spiky(settings_for, "every", rollback_steps=rollback_steps)
    few = spiky(settings_for, "few", rollback_steps=rollback_steps, keep_checkpoints=1)
    train(every)
    train(few)
    assert without_speed(few.out) == without_speed(every.out)
    assert checkpoint_steps(few.out) == (kept if rollback_steps == 3 else checkpoint_steps(every.out))


def test_plots_and_report_show_the_run_that_counts(
    settings_for: SettingsFor, plant: Callable[..., list[int]]
) -> None:
    plant(BAD)
    settings = spiky(settings_for)
    train(settings)
    assert len(plot_run(settings.out)) == 4
    assert "24 steps" in write_report(settings.out).read_text()


def put_checkpoint(run: Path, step: int) -> None:
    """An empty one."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).touch()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0], [0]),
        ([0, 5], [0, 5]),
        ([0, 5, 100], [0, 100]),
        ([0, 100, 200], [0, 100, 200]),
        ([0, 100, 200, 300], [100, 200, 300]),
        ([0, 100, 200, 300, 350, 360], [100, 200, 300, 350, 360]),
        ([0, 100, 200, 300, 350, 360, 400], [200, 300, 400]),
    ],
    ids=lambda steps: "-".join(map(str, steps)),
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_irregular_checkpoints_take_no_place(
    settings_for: SettingsFor, steps: list[int], expected: list[int], count: int
) -> None:
    settings = settings_for(
        checkpoint_every=100, keep_checkpoints=count, on_spike="rollback", rollback_steps=100
    )
    for step in steps:
        put_checkpoint(settings.out, step)
        checkpoints.keep_checkpoints(settings.out, checkpoints_to_keep(settings, step + 1 - 20))
    assert checkpoint_steps(settings.out) == expected


def test_good_checkpoints_are_regular_and_old_enough(settings_for: SettingsFor) -> None:
    settings = settings_for(checkpoint_every=10, rollback_steps=15)
    assert good_checkpoint(settings, 50) is None
    for step in (0, 10, 20, 26, 30, 40):
        put_checkpoint(settings.out, step)
    found = [good_checkpoint(settings, onset) for onset in (0, 1, 14, 25, 41, 44, 45, 1000)]
    assert found == [None, 0, 0, 10, 20, 20, 30, 40]


def test_what_is_decided_is_described(settings_for: SettingsFor) -> None:
    spike, state = Spike(40, 38, ("one", "another")), TrainState(40, 400, 0, attempt=1, batches_skipped=7)
    settings = settings_for(on_spike="report")
    entry = respond(spike, settings, state)
    assert entry == {"reasons": ["one", "another"], "onset": 38, "action": "report"}
    assert describe(entry, settings, state) == "spike at step 40: one, another; the run continues"
    nowhere = replace(settings, on_spike="rollback")
    entry = respond(spike, nowhere, state)
    assert entry["action"] == "stop"
    told = describe(entry, nowhere, state)
    assert "; stopping, no checkpoint from before step 38 to go back to; a checkpoint is" in told
    put_checkpoint(settings.out, 0)
    assert respond(spike, nowhere, state)["action"] == "rollback"
    tired = replace(nowhere, max_rollbacks=1)
    entry = respond(spike, tired, state)
    assert entry["action"] == "stop"
    assert "; stopping, --max-rollbacks 1 is reached; a checkpoint is" in describe(entry, tired, state)


def test_a_run_whose_first_step_is_its_undoing_ends(settings_for: SettingsFor) -> None:
    settings = settings_for(
        learning_rate=1e30, warmup_steps=0, grad_clip=0, on_spike="rollback", max_rollbacks=1
    )
    assert train(settings).exit_code == 3
    assert [spike["action"] for _, spike in spikes(settings.out)] == ["rollback", "stop"]
    assert read_metrics(settings.out)[-1]["loss"] is None


@pytest.mark.slow
def test_two_processes_decide_alike(settings_for: SettingsFor) -> None:
    alone, together = (
        settings_for(
            name, learning_rate=1e30, warmup_steps=0, grad_clip=0, on_spike="rollback", max_rollbacks=2,
            qk_clip=0.01, steps=4,
        )
        for name in ("alone", "together")
    )  # fmt: skip
    train(alone)
    code, output = finish(start(together, torchrun(2)))
    assert code != 0
    assert output.count("spike at step") == 3, output
    assert [spike["action"] for _, spike in spikes(together.out)] == ["rollback", "rollback", "stop"]
    first, second = (read_metrics(run.out, abandoned=True)[0] for run in (alone, together))
    assert second["qk_clipped"] == first["qk_clipped"] > 0


def test_abandoned_lines_stay_and_are_not_read(tmp_path: Path) -> None:
    def write(log: MetricsLog, steps: range, **extra: Any) -> None:
        for step in steps:
            log.write({"step": step, **extra})

    log = MetricsLog(tmp_path)
    log.begin(0)
    write(log, range(1, 6))
    log.write({"step": 6, "spike": {"action": "rollback", "to_step": 3}})
    assert log.begin(3, attempt=1) == {"step": 3}
    write(log, range(4, 8), attempt=1)
    log.write({"step": 8, "attempt": 1, "spike": {"action": "report"}})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert log.begin(5, attempt=1) == {"step": 5, "attempt": 1}
    steps = [line["step"] for line in read_metrics(tmp_path, abandoned=True)]
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5]
    assert log.begin(5) == {"step": 5}  # a process killed in its rollback does those steps again
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path, abandoned=True)] == [1, 2, 3, 4, 5]
