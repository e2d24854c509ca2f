"""`SpikeCallback`: what it sees in a Trainer's logs, and rollback with other batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.huggingface.watched_decoders import make_llama, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

from longshort.huggingface.callbacks import LogitCallback, attach
from longshort.huggingface.spike_callback import SpikeCallback
from longshort.stability import SpikeDetector

DATA: Any = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=64, length=8)]  # 16 steps an epoch


class Poison(TrainerCallback):
    """Spoils the weights before some steps, the first time that they are reached."""

    def __init__(self, *steps: int) -> None:
        self.left = set(steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.left:
            self.left.remove(state.global_step + 1)
            with torch.no_grad():
                kwargs["model"].lm_head.weight.mul_(1000)


def make_trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> tuple[Trainer, list[Any]]:
    """A Trainer, and the (step, first tokens) of each of its micro-batches."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 24, "logging_steps": 1, "learning_rate": 1e-3,
        "save_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    } | settings  # fmt: skip
    model = make_llama(num_hidden_layers=1)
    trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=DATA)
    attach(trainer, *callbacks)
    taken: list[Any] = []
    step = trainer.training_step

    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append((trainer.state.global_step + 1, inputs["input_ids"].tolist()))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = recorded
    return trainer, taken


def detector() -> SpikeDetector:
    return SpikeDetector(window=6)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_report_goes_on_and_stop_saves(tmp_path: Path) -> None:
    reporting = SpikeCallback("report", detector())
    trainer, _ = make_trainer(tmp_path / "a", reporting, Poison(10), save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 24
    assert reporting.spikes[0]["step"] == reporting.spikes[0]["onset"] == 10
    assert reporting.spikes[0]["action"] == "report"
    assert "above its median" in reporting.spikes[0]["reasons"][0]

    stopping = SpikeCallback("stop", detector())
    trainer, _ = make_trainer(tmp_path / "b", stopping, Poison(10))
    trainer.train()
    assert trainer.state.global_step == 10
    assert names(tmp_path / "b") == {"checkpoint-4", "checkpoint-8", "checkpoint-10"}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rollback_trains_on_from_a_checkpoint_with_later_batches(tmp_path: Path, accumulated: int) -> None:
    settings = {"gradient_accumulation_steps": accumulated}
    plain, undisturbed = make_trainer(tmp_path / "plain", max_steps=40, save_strategy="no", **settings)
    plain.train()
    folder = tmp_path / "run"
    logits = LogitCallback(every=5, file=folder / "metrics.jsonl")
    spikes = SpikeCallback("rollback", detector(), logits=logits, rollback_steps=3, skip_batches=2)
    trainer, taken = make_trainer(folder, logits, spikes, Poison(14), **settings)
    batches = trainer.get_batch_samples
    output = spikes.train(trainer)
    assert output.global_step == 24
    assert trainer.get_batch_samples == batches
    (spike,) = spikes.spikes
    assert (spike["step"], spike["to_step"], spike["batches_skipped"]) == (14, 8, 6)
    assert names(folder) == {
        "checkpoint-4", "checkpoint-8", "abandoned-1-checkpoint-12", "checkpoint-12", "checkpoint-16",
        "checkpoint-20", "checkpoint-24",
    }  # fmt: skip

    by_step = lambda step: [batch for at, batch in undisturbed if at == step]  # noqa: E731
    expected = [(step, batch) for step in range(1, 15) for batch in by_step(step)]
    expected += [(step, batch) for step in range(9, 25) for batch in by_step(step + 6)]
    assert taken == expected

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("attempt", 0)) for line in steps] == [
        (1, 0), (5, 0), (10, 0), (14, 0), (10, 1), (15, 1), (20, 1), (24, 1),
    ]  # fmt: skip
    assert steps[3]["spike"]["action"] == "rollback"
    history = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert history == list(range(1, 25))

    again = SpikeCallback("rollback", detector(), rollback_steps=3, skip_batches=2)
    trainer, resumed = make_trainer(folder, again, **settings)
    again.train(trainer, folder / "checkpoint-20")  # in another process: the batches are left out still
    assert resumed == [entry for entry in expected[14 * accumulated :] if entry[0] > 20]


def test_the_state_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    spikes = SpikeCallback("rollback", detector(), rollback_steps=3, skip_batches=0)
    trainer, _ = make_trainer(tmp_path / "run", spikes, Poison(7), max_steps=8, learning_rate=1e-9)
    seen: list[Any] = []
    trainer.add_callback(Weights(seen))
    spikes.train(trainer)
    first, after = (entry for entry in seen if entry[0] == 5)  # after a rollback to step 4
    assert torch.equal(first[1], after[1])
    assert first[2] == after[2] > 0


class Weights(TrainerCallback):
    """Keeps the weights and the learning rate at the beginning of each step."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.seen.append((state.global_step + 1, kwargs["model"].lm_head.weight.detach().clone(), rate))


def test_without_a_checkpoint_and_after_the_last_rollback_it_stops(tmp_path: Path) -> None:
    early = SpikeCallback("rollback", SpikeDetector(window=2))
    trainer, _ = make_trainer(tmp_path / "a", early, Poison(3))
    early.train(trainer)
    assert (trainer.state.global_step, early.spikes[0]["action"]) == (3, "stop")
    limited = SpikeCallback("rollback", detector(), rollback_steps=2, skip_batches=0, max_rollbacks=1)
    trainer, _ = make_trainer(tmp_path / "b", limited, Poison(10, 16))
    limited.train(trainer)
    assert [spike["action"] for spike in limited.spikes] == ["rollback", "stop"]
    assert trainer.state.global_step == 16
    assert limited.batches_left_out == 10 - 8


def test_logits_and_alarms_are_watched(tmp_path: Path) -> None:
    logits = LogitCallback(every=2)
    watching = SpikeCallback("report", SpikeDetector(logit_bound=1e-3), logits=logits)
    trainer, _ = make_trainer(tmp_path, logits, watching, save_strategy="no", max_steps=3)
    trainer.train()
    assert [(s["step"], "largest logit" in s["reasons"][0]) for s in watching.spikes] == [(1, True)]
    logits = LogitCallback(every=1)
    watching = SpikeCallback("report", SpikeDetector(alarm="entropy", alarm_bound=1e-6), logits=logits)
    trainer, _ = make_trainer(tmp_path, logits, watching, save_strategy="no", max_steps=4)
    trainer.train()
    assert "fall of the entropy" in watching.spikes[0]["reasons"][0]


def test_the_detector_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    whole = SpikeCallback("report", detector())
    trainer, _ = make_trainer(tmp_path, whole, max_steps=8)
    trainer.train()
    resumed = SpikeCallback("report", detector())
    trainer, _ = make_trainer(tmp_path, resumed, max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state() == whole.state()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_spike must be one of report, stop, rollback, got 'panic'"):
        SpikeCallback("panic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rollback_steps must be an integer >= 1, got 0"):
        SpikeCallback(rollback_steps=0)
    with pytest.raises(ValueError, match=r"logits must be a LogitCallback for .*'entropy', got None"):
        SpikeCallback(detector=SpikeDetector(alarm="entropy"))
    with pytest.raises(
        ValueError, match=r"LogitCallback\(update_entropy=True\) for .*'update', got one with"
    ):
        SpikeCallback(detector=SpikeDetector(alarm="update"), logits=LogitCallback())
    spikes = SpikeCallback("rollback")
    trainer, taken = make_trainer(tmp_path, spikes)
    with pytest.raises(ValueError, match=r"needs SpikeCallback\.train\(trainer\)"):
        trainer.train()
    for settings in ({"save_strategy": "no"}, {"save_only_model": True}):
        other, _ = make_trainer(tmp_path, **settings)
        with pytest.raises(ValueError, match="on_spike='rollback' needs checkpoints"):
            spikes.train(other)
    other, _ = make_trainer(tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint must be False"):
        spikes.train(other)
    assert taken == []


def test_it_can_join_a_training_that_resumes(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=4)[0].train()
    joined = SpikeCallback("report", detector())
    trainer, _ = make_trainer(tmp_path, joined, Poison(14), max_steps=16)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert joined.spikes[0]["step"] == 14
    assert "checkpoint-16" in names(tmp_path)
