"""A run that was killed, stopped or had its disk filled goes on as if nothing had happened."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
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
    wait_for_step,
    without_speed,
)

from longshort.data import Batch, Batches, DataFolder, prepare
from longshort.training import checkpoints
from longshort.training.checkpoints import latest_checkpoint
from longshort.training.loop import resume, train
from longshort.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from longshort.training.optimization import batch_loss
from longshort.training.parallel import Ranks
from longshort.training.run import create_run, plan_run, read_run


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(settings_for: SettingsFor, kills: int) -> None:
    steps = 60 * kills
    changes = {"steps": steps, "checkpoint_every": 3, "monitor_every": 2, "evaluate_every": 7}
    whole, killed = settings_for("whole", **changes), settings_for("killed", **changes)
    train(whole)
    choose = random.Random(kills)
    steps_done = 0
    for _ in range(kills):
        process = start(killed)
        wait_for_step(process, steps_done + choose.randrange(1, 12))
        time.sleep(choose.random() * 0.05)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        latest = latest_checkpoint(killed.out)
        steps_done = int(latest.name.removeprefix("step-")) if latest else 0
    assert resume(killed.out).step == steps
    assert without_speed(killed.out) == without_speed(whole.out)
    assert names(killed.out) == names(whole.out)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [run / "checkpoints" / f"step-{steps}" / name for run in (whole.out, killed.out)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_killed_before_the_first_checkpoint(settings_for: SettingsFor) -> None:
    whole, killed = settings_for("whole", steps=40), settings_for("killed", steps=40, checkpoint_every=40)
    train(whole)
    process = start(killed)
    wait_for_step(process, 3)
    process.kill()
    finish(process)
    assert latest_checkpoint(killed.out) is None
    recorder = Recorder()
    assert resume(killed.out, progress=recorder).step == 40
    assert recorder.starts == [0]
    assert without_speed(killed.out) == without_speed(whole.out)


@pytest.mark.parametrize("junk", [b"", b'{"step": 13, "loss": 0.', b'{"step": 11, "loss": 9.0}\n{"step": 12'])
def test_metrics_are_cut_back_to_the_checkpoint(settings_for: SettingsFor, junk: bytes) -> None:
    whole, cut = settings_for("whole"), settings_for("cut")
    for settings in (whole, cut):
        train(settings)
    shutil.rmtree(cut.out / "checkpoints" / "step-12")
    partial = cut.out / "checkpoints" / ".step-11.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    with open(cut.out / METRICS_FILE, "ab") as file:
        file.write(junk)
    recorder = Recorder()
    resume(cut.out, progress=recorder)
    assert recorder.starts == [10]
    assert [step for step, _ in recorder.steps] == [11, 12]
    assert without_speed(cut.out) == without_speed(whole.out)
    assert names(cut.out) == names(whole.out)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 3, "precision": "bf16", "separate_documents": True, "qk_norm": True},
        {"qk_learning_rate_factor": 0.1, "adam_epsilon": 1e-6, "kv_heads": 2, "global_heads": 2},
        {"mhsa": True, "schedule": "constant", "position_embedding": "rope", "tensorboard": True},
    ],
)
def test_other_settings_go_on_bit_by_bit_too(settings_for: SettingsFor, changes: dict) -> None:
    whole, cut = settings_for("whole", **changes), settings_for("cut", **changes)
    for settings in (whole, cut):
        train(settings)
    shutil.rmtree(cut.out / "checkpoints" / "step-12")
    resume(cut.out)
    assert without_speed(cut.out) == without_speed(whole.out)


def test_a_run_of_an_earlier_version_goes_on_with_its_documents(settings_for: SettingsFor) -> None:
    many_tokens = {"sequence_length": 384, "batch_size": 12}  # so that some end a document
    changes = {"separate_documents": True, "steps": 6, "checkpoint_every": 4, **many_tokens}
    new, whole, cut = (settings_for(name, **changes) for name in ("new", "whole", "cut"))
    train(new)
    for settings in (whole, cut):
        create_run(*plan_run(settings))
        file = settings.out / "config.json"
        config = json.loads(file.read_text())
        del config["document_start"]
        file.write_text(json.dumps(config))
        resume(settings.out)
    shutil.rmtree(cut.out / "checkpoints" / "step-6")
    resume(cut.out)
    assert without_speed(cut.out) == without_speed(whole.out)

    run, ranks = read_run(whole.out), Ranks(torch.device("cpu"), 0, 1)
    batch = Batches(DataFolder.open(new.data).train, 384, 12, seed=0).batch(0)
    ends = (batch.input_ids == 256).long()  # an end-of-text token is of the document that it ends
    assert ends.any()
    cut_after = Batch(batch.input_ids, batch.labels, ends.cumsum(1) - ends)
    assert losses(whole.out)[0] == batch_loss(run.build_model(), cut_after, run.training, ranks).item()
    assert losses(whole.out)[0] != losses(new.out)[0]
    assert losses(new.out)[0] == batch_loss(run.build_model(), batch, run.training, ranks).item()


def test_a_run_from_before_a_setting_goes_on_with_its_default(settings_for: SettingsFor) -> None:
    whole, cut = settings_for("whole"), settings_for("cut")
    for settings in (whole, cut):
        train(settings)
    shutil.rmtree(cut.out / "checkpoints" / "step-12")
    file = cut.out / "config.json"
    config = json.loads(file.read_text())
    assert config["training"].pop("adam_epsilon") == 1e-8
    assert config["training"].pop("qk_learning_rate_factor") == 1.0
    file.write_text(json.dumps(config))
    resume(cut.out)
    assert without_speed(cut.out) == without_speed(whole.out)


class Interrupter(Recorder):
    """Sends signals to its own process after a step."""

    def __init__(self, step: int, *signals: int) -> None:
        super().__init__()
        self._when = step
        self._signals = signals

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        super().on_step(step, record)
        for number in self._signals if step == self._when else ():
            signal.raise_signal(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(settings_for: SettingsFor, number: int, code: int) -> None:
    whole, stopped = settings_for("whole"), settings_for("a stopped run")
    train(whole)
    interrupter = Interrupter(7, number)
    outcome = train(stopped, interrupter)
    assert (outcome.step, outcome.steps, outcome.signal, outcome.exit_code) == (7, 12, number, code)
    assert interrupter.messages[0].startswith("stopping; a checkpoint is written first")
    command = f"longshort train --resume '{stopped.out}'"
    assert interrupter.messages[1] == f"stopped after step 7; to resume: {command}"
    assert names(stopped.out) == ["step-5", "step-7"]
    assert resume(stopped.out).exit_code == 0
    assert without_speed(stopped.out) == without_speed(whole.out)


def test_second_ctrl_c_stops_at_once_and_costs_no_checkpoint(settings_for: SettingsFor) -> None:
    settings = settings_for()
    with pytest.raises(KeyboardInterrupt):
        train(settings, Interrupter(7, signal.SIGINT, signal.SIGINT))
    assert names(settings.out) == ["step-5"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert resume(settings.out).step == 12


def test_termination_after_ctrl_c_is_the_same_wish(settings_for: SettingsFor) -> None:
    outcome = train(settings_for(), Interrupter(7, signal.SIGINT, signal.SIGTERM, signal.SIGTERM))
    assert (outcome.step, outcome.exit_code) == (7, 130)


def test_ctrl_c_in_the_last_step_finishes_the_run(settings_for: SettingsFor) -> None:
    outcome = train(settings_for(), Interrupter(12, signal.SIGINT))
    assert (outcome.step, outcome.exit_code) == (12, 0)


def test_ctrl_c_from_a_terminal(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=3000, checkpoint_every=3000)
    process = start(settings)
    wait_for_step(process, 2)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert f"to resume: longshort train --resume {settings.out}" in output
    latest = latest_checkpoint(settings.out)
    assert latest is not None
    assert read_metrics(settings.out)[-1]["step"] == int(latest.name.removeprefix("step-"))


def test_full_disk_ends_the_run_and_costs_no_checkpoint(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = settings_for("whole"), settings_for("full")
    train(whole)
    sync_tree = checkpoints.sync_tree

    def full_at_step_10(folder: Path) -> None:
        if "step-10" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync_tree(folder)

    monkeypatch.setattr(checkpoints, "sync_tree", full_at_step_10)
    with pytest.raises(OSError, match=r"step 10 could not be written .*No space left on device"):
        train(full)
    assert names(full.out) == ["step-5"]
    monkeypatch.undo()
    resume(full.out)
    assert without_speed(full.out) == without_speed(whole.out)


def test_full_disk_in_a_line_of_metrics(settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, full = settings_for("whole"), settings_for("full")
    train(whole)
    write = MetricsLog.write

    def write_half_a_line(self: MetricsLog, record: dict[str, Any]) -> None:
        if record["step"] < 8:
            write(self, record)
            return
        with open(full.out / METRICS_FILE, "ab") as file:
            file.write(b'{"step": 8, "lo')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "write", write_half_a_line)
    with pytest.raises(OSError, match="No space left on device"):
        train(full)
    monkeypatch.undo()
    resume(full.out)
    assert without_speed(full.out) == without_speed(whole.out)


def test_more_steps_keep_the_schedule_as_it_was_laid_out(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=12)
    train(settings)
    assert resume(settings.out, steps=16).step == 16
    records = read_metrics(settings.out)
    assert [record["step"] for record in records] == list(range(1, 17))
    rates = [record["learning_rate"] for record in records]
    assert rates[12:] == pytest.approx([settings.learning_rate / 10] * 4)
    assert read_run(settings.out).training.steps == 16
    assert read_run(settings.out).training.schedule_steps == 12
    longer = settings_for("longer", steps=16, warmup_steps=1, schedule_steps=12)
    train(longer)
    assert losses(settings.out) == losses(longer.out)


def test_finished_run_has_nothing_to_do(settings_for: SettingsFor) -> None:
    settings = settings_for()
    train(settings)
    before = without_speed(settings.out)
    recorder = Recorder()
    assert resume(settings.out, progress=recorder).exit_code == 0
    assert recorder.messages == ["all 12 steps are done; --steps adds more"]
    assert without_speed(settings.out) == before


@pytest.mark.parametrize(
    ("told", "message"),
    [({"steps": 0}, "--steps must be"), ({"threads": 0}, "--threads must be"), ({"steps": 3}, "at least 12")],
)
def test_wrong_argument_changes_nothing(settings_for: SettingsFor, told: dict, message: str) -> None:
    settings = settings_for()
    train(settings)
    before = {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        resume(settings.out, **told)
    assert {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()} == before


def test_moved_run_and_moved_data(settings_for: SettingsFor, data: Path, tmp_path: Path) -> None:
    here = tmp_path / "data here"
    shutil.copytree(data, here)
    whole, moved = settings_for("whole"), settings_for("moved", data=here)
    train(whole)
    assert train(moved, Interrupter(6, signal.SIGINT)).step == 6
    run = moved.out.rename(tmp_path / "run elsewhere")
    elsewhere = here.rename(tmp_path / "data elsewhere")
    with pytest.raises(FileNotFoundError, match="there is no data folder"):
        resume(run)
    assert resume(run, data=elsewhere).step == 12
    assert read_run(run).training.data == elsewhere
    assert without_speed(run) == without_speed(whole.out)


def test_other_data_is_refused(settings_for: SettingsFor, tmp_path: Path) -> None:
    settings = settings_for()
    train(settings, Interrupter(6, signal.SIGINT))
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text("other " * 100)
    other = prepare(texts, tmp_path / "other", validation_fraction=0.25).folder
    before = read_run(settings.out)
    with pytest.raises(ValueError, match="is not the data that this run was started on"):
        resume(settings.out, data=other)
    assert read_run(settings.out) == before
    assert len(read_metrics(settings.out)) == 6


def test_run_in_progress_is_left_alone(settings_for: SettingsFor) -> None:
    settings = settings_for()
    train(settings, Interrupter(6, signal.SIGINT))
    log = MetricsLog(settings.out)
    with pytest.raises(BlockingIOError, match="is being trained by another process"):
        resume(settings.out)
    log.close()
    assert resume(settings.out).step == 12


def test_other_versions_are_mentioned(settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for()
    train(settings, Interrupter(6, signal.SIGINT))
    versions: Callable[[], dict[str, str]] = lambda: {"longshort": "9.0", "torch": "9.0"}  # noqa: E731
    monkeypatch.setattr("longshort.training.loop.current_versions", versions)
    recorder = Recorder()
    resume(settings.out, progress=recorder)
    assert "the last bits of the losses may differ" in recorder.messages[0]


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_those_of_the_run(settings_for: SettingsFor) -> None:
    settings = settings_for(threads=1)
    train(settings, Interrupter(6, signal.SIGINT))
    resume(settings.out)
    resumed = read_run(settings.out).training
    assert resumed == replace(settings, **{name: getattr(resumed, name) for name in _RESOLVED})


_RESOLVED = (
    "data", "global_heads", "layers", "kv_heads", "position_embedding", "qk_norm", "sink_logits",
    "sink_tokens", "attention_precision", "warmup_steps", "schedule_steps", "min_learning_rate",
)  # fmt: skip
