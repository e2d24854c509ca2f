"""Runs that measure alarms: what they write, that nothing else changes, and that they go on after a break."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import Recorder, SettingsFor, assert_close_metrics, train_together, without_speed

from longshort.stability import ALARMS, SpikeDetector
from longshort.stability.alarms import ALARM_MEASUREMENTS
from longshort.training.loop import resume, train
from longshort.training.metrics import read_metrics

BY_HEAD = tuple(ALARM_MEASUREMENTS.values())


def without_alarms(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(("row_range", "update_entropy"))}
        for line in without_speed(run)
    ]


def weights(run: Path, step: int = 12) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_what_alarms_need_is_measured_by_head_on_monitored_steps(
    settings_for: SettingsFor, kv_heads: int
) -> None:
    settings = settings_for(alarms=True, kv_heads=kv_heads, global_heads=4 if kv_heads == 1 else None)
    train(settings)
    for line in read_metrics(settings.out):
        measured = [name for name in BY_HEAD if name in line]
        assert measured == (list(BY_HEAD) if line["step"] in (1, 4, 8, 12) else [])
        for name in measured:
            assert torch.tensor(line[name]).shape == (2, 4)
            assert (torch.tensor(line[name]) > 0).all()
        if measured:
            assert torch.tensor(line["row_range_by_head"]).max().item() == line["row_range"]


@pytest.mark.parametrize("changes", [{"alarms": True}, *({"alarm": a, "on_spike": "report"} for a in ALARMS)])
def test_measuring_alarms_changes_no_bit_of_the_training(settings_for: SettingsFor, changes: Any) -> None:
    plain, alarmed = settings_for("plain"), settings_for("alarmed", **changes)
    train(plain)
    train(alarmed)
    assert without_alarms(alarmed.out) == without_speed(plain.out)
    assert weights(alarmed.out) == weights(plain.out)


@pytest.mark.parametrize("changes", [{"alarms": True}, *({"alarm": a, "on_spike": "report"} for a in ALARMS)])
def test_a_break_between_measurements_does_not_show(settings_for: SettingsFor, changes: Any) -> None:
    """The checkpoint of step 10 comes after the measurement of step 8: the next is of steps 9 to 12."""
    whole, cut = settings_for("whole", **changes), settings_for("cut", **changes)
    for settings in (whole, cut):
        train(settings)
    shutil.rmtree(cut.out / "checkpoints" / "step-12")
    recorder = Recorder()
    resume(cut.out, progress=recorder)
    assert recorder.starts == [10]
    assert without_speed(cut.out) == without_speed(whole.out)
    state = [(run / "checkpoints" / "step-12" / "state.json").read_text() for run in (whole.out, cut.out)]
    assert state[0] == state[1]


@pytest.mark.parametrize("alarm", ALARMS)
def test_an_alarm_stops_the_run(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, alarm: Any
) -> None:
    """With a bound that every run exceeds."""
    monkeypatch.setattr("longshort.training.loop.SpikeDetector", partial(SpikeDetector, alarm_bound=1e-9))
    settings = settings_for(alarm=alarm, on_spike="stop", monitor_every=1, steps=24, learning_rate=3e-2)
    outcome = train(settings)
    assert outcome.exit_code == 3
    last = read_metrics(settings.out)[-1]
    (reason,) = last["spike"]["reasons"]
    assert reason.endswith("above 1e-09") and "of a head" in reason
    assert outcome.step == last["step"] >= (10 if alarm == "row-range" else 2)


def test_an_alarm_rolls_back_to_a_checkpoint_with_its_measurement(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshort.training.loop.SpikeDetector", partial(SpikeDetector, alarm_bound=1e-9))
    settings = settings_for(
        alarm="update", on_spike="rollback", max_rollbacks=1, rollback_steps=1, checkpoint_every=2, steps=24
    )
    outcome = train(settings)
    assert outcome.exit_code == 3
    spikes = [line["spike"] for line in read_metrics(settings.out, abandoned=True) if "spike" in line]
    assert [spike["action"] for spike in spikes] == ["rollback", "stop"]


def test_two_processes_measure_as_one(settings_for: SettingsFor) -> None:
    changes: dict[str, Any] = {"alarms": True, "steps": 5, "checkpoint_every": 5, "tensorboard": False}
    one, two = settings_for("one", **changes), settings_for("two", **changes)
    train(one)
    train_together(two, 2)
    assert_close_metrics(two.out, one.out, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alarms": True, "monitor_every": 0}, "--alarms needs --monitor-every >= 1, got 0"),
        (
            {"alarm": "update", "on_spike": "stop", "monitor_every": 0},
            "--alarm needs --monitor-every >= 1, got 0",
        ),
        ({"alarm": "entropy"}, "--alarm goes only with --on-spike, got entropy"),
        (
            {"alarm": "loss", "on_spike": "stop"},
            "--alarm must be one of row-range, entropy, update, got",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings_for: SettingsFor, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_for(**changes)
