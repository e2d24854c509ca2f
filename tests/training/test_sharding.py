"""Processes that cut the model, or each sequence, among them train what one process does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_processes
from tests.training.runs import SettingsFor, assert_close_metrics, losses, torchrun, train_together
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from longshort.cli import main
from longshort.data import Batches
from longshort.model import LongShortForCausalLM
from longshort.stability import Spike, SpikeDetector
from longshort.training import loop
from longshort.training.checkpoints import checkpoint_folder
from longshort.training.config import TrainConfig
from longshort.training.job import prepare_job
from longshort.training.loop import train
from longshort.training.metrics import read_metrics
from longshort.training.parallel import connect
from longshort.training.run import plan_run
from longshort.training.sharding import new_groups
from longshort.training.trained import open_trained


def assert_same_weights(run: TrainConfig, other: TrainConfig, step: int) -> None:
    """The weights of two runs are within 1e-4 of each other, in norm, tensor by tensor."""
    mine, theirs = (open_trained(settings.out, step=step).model for settings in (run, other))
    for (name, one), two in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm(), name


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {"parallel": "fsdp", "micro_batch_size": 1, "async_checkpoints": True}),
    "ddp, sequences in two": (2, {"context_parallel": 2}),
    "fsdp, sequences in two": (2, {"parallel": "fsdp", "context_parallel": 2}),
}
MANY: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp on 4": (4, {"parallel": "fsdp"}),
    "copies of shards": (4, {"parallel": "fsdp", "shards": 2}),
    "ddp, sequences in four": (4, {"context_parallel": 4}),
    "ddp, sequences in four, in a ring": (4, {"context_parallel": 4, "gather_memory": 0}),
    "fsdp, 2 × 2": (4, {"parallel": "fsdp", "context_parallel": 2}),
}
MODELS: dict[str, dict[str, Any]] = {
    "LS": {
        "steps": 20, "qk_clip": 0.02, "z_loss": 0.1, "separate_documents": True, "validation_windows": 5,
        "qk_learning_rate_factor": 0.1,
    },
    "LS, awkward": {
        "steps": 20, "sequence_length": 47, "window": 30, "kv_heads": 2, "global_heads": 2, "sink_tokens": 2,
        "position_embedding": "rope", "sink_logits": True, "gradient_checkpointing": True, "grad_clip": 0.1,
    },
    "MHSA": {"steps": 20, "mhsa": True, "position_embedding": "alibi", "on_spike": "report", "softcap": 5.0},
}  # fmt: skip
QUICK = [("ddp, sequences in two", "LS, awkward"), ("fsdp, sequences in two", "LS")]


@pytest.mark.parametrize(
    ("mode", "model"),
    [
        *QUICK,
        *(
            pytest.param(mode, model, marks=pytest.mark.slow)
            for mode in MODES | MANY
            for model in MODELS
            if (mode, model) not in QUICK and not (model == "MHSA" and "ring" in mode)
        ),
    ],
)
def test_processes_train_what_one_does(mode: str, model: str, settings_for: SettingsFor) -> None:
    processes, changes = (MODES | MANY)[mode]
    alone = settings_for("alone", **MODELS[model])
    together = settings_for("together", **MODELS[model], **changes)
    train(alone)
    train_together(together, processes)
    assert losses(together.out) == pytest.approx(losses(alone.out), rel=1e-5)
    assert_close_metrics(together.out, alone.out, rel=1e-3)  # logits move more than losses
    assert_same_weights(together, alone, 20)
    folder = checkpoint_folder(together.out, 20)
    assert bool(list(folder.glob("shard-*.safetensors"))) == (changes.get("parallel") == "fsdp")
    assert not list(folder.rglob(".metadata"))


def test_shards_are_exported(settings_for: SettingsFor, tmp_path: Path, fails: Any) -> None:
    settings = settings_for(parallel="fsdp", steps=6, checkpoint_every=3)
    train_together(settings, 2)
    run, out = settings.out, tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    exported, trained = LongShortForCausalLM.from_pretrained(out), open_trained(run).model
    for mine, theirs in zip(exported.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "exists already; --overwrite replaces" in fails(1, "export", run, out)
    assert main(["export", str(run), str(out), "--step", "3", "--overwrite"]) == 0
    assert "holds no exported model" in fails(1, "export", run, run, "--overwrite")
    assert "no checkpoint of step 4, only of 3, 6" in fails(1, "export", run, tmp_path / "x", "--step", "4")
    assert main(["generate", str(run), "--prompt", "the ", "--max-new-tokens", "3"]) == 0
    broken = tmp_path / "broken"
    for missing in ("1", "2"):
        shutil.copytree(run, broken)
        next((broken / "checkpoints/step-6").glob(f"shard-0000{missing}-*")).unlink()
        with pytest.raises(OSError, match="is damaged, or of another model"):
            open_trained(broken)
        shutil.rmtree(broken)


@pytest.mark.slow
def test_checkpoints_go_from_mode_to_mode(settings_for: SettingsFor) -> None:
    one_head = {"heads": 1, "head_dim": 32, "sink_logits": True}  # AdamW's `step` has as many elements
    settings = settings_for(parallel="fsdp", steps=6, checkpoint_every=3, **one_head)
    train_together(settings, 2)
    run = settings.out
    for changes, launcher in (
        ({"parallel": "ddp", "steps": 8}, ()),  # one process
        ({"parallel": "fsdp", "steps": 10}, torchrun(2)),  # from whole files to shards
        ({"parallel": "ddp", "steps": 12}, torchrun(2)),
    ):
        flags = [f"--{name}={value}" for name, value in changes.items()]
        command = [*launcher, sys.executable, "-m", "longshort", "train", "--resume", str(run), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    whole = settings_for("whole", steps=12, checkpoint_every=3, warmup_steps=0, schedule_steps=6, **one_head)
    train(whole)
    assert losses(run) == pytest.approx(losses(whole.out), rel=1e-5)


def train_with_a_planted_batch(settings: TrainConfig) -> None:
    draw = Batches.batch

    def batch(self: Batches, step: int, *ranks: Any) -> Any:
        drawn = draw(self, step, *ranks)
        return drawn._replace(labels=torch.full_like(drawn.labels, 7)) if step == 15 else drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", batch)
        patch.setattr(loop, "SpikeDetector", partial(SpikeDetector, window=10, loss_score=2.0))
        train(settings)


@pytest.mark.slow
def test_shards_roll_back_as_one_process_does(settings_for: SettingsFor) -> None:
    spiky: dict[str, Any] = {
        "learning_rate": 1e-2, "evaluate_every": 0, "steps": 24, "checkpoint_every": 4, "alarms": True,
        "on_spike": "rollback", "rollback_steps": 3, "skip_batches": 6,
    }  # fmt: skip
    alone = settings_for("alone", **spiky)
    together = settings_for("together", parallel="fsdp", async_checkpoints=True, **spiky)
    train_with_a_planted_batch(alone)
    run_processes(train_with_a_planted_batch, 2, together)
    lines = read_metrics(together.out, abandoned=True)
    assert [line["spike"]["to_step"] for line in lines if "spike" in line] == [12]
    assert losses(together.out) == pytest.approx(losses(alone.out), rel=1e-5)
    for mine, theirs in zip(read_metrics(together.out), read_metrics(alone.out), strict=True):
        entropies = [line.get("update_entropy_by_head", [[0.0]]) for line in (mine, theirs)]
        assert torch.tensor(entropies[0]).allclose(torch.tensor(entropies[1]), rtol=1e-3)


def compare_initial_shards(settings: TrainConfig) -> None:
    with loop._connected(settings) as ranks:
        run, data = plan_run(settings)
        model = prepare_job(run, data, ranks).model
        alone = run.build_model()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == alone.config.tie_word_embeddings
        for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert isinstance(mine, DTensor), name
            assert mine.to_local().numel() < theirs.numel() or theirs.shape[0] < 2
            assert torch.equal(mine.full_tensor(), theirs), name
        for mine, theirs in zip(model.buffers(), alone.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("is_tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_initial_shards_are_those_of_one_process(
    is_tied: bool, settings_for: SettingsFor, tmp_path: Path
) -> None:
    preset = tmp_path / "model.json"
    preset.write_text(json.dumps({"preset": "tiny", "tie_word_embeddings": is_tied}))
    settings = settings_for(
        preset=str(preset), parallel="fsdp", position_embedding="alibi", sink_logits=True, short_convolution=3
    )
    run_processes(compare_initial_shards, 2, settings)


def check_time_outs() -> None:
    with connect("cpu", context_parallel=2, timeout=20.0) as ranks:
        assert ranks.context is not None
        groups = [ranks.context.group, new_groups(torch.arange(2).view(2, 1), ranks.timeout)]
        for group in groups:
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=20)


def test_all_groups_have_the_time_out() -> None:
    run_processes(check_time_outs, 2)


def train_while_saving_is_slow(settings: TrainConfig) -> None:
    steps = []
    write_data = HuggingFaceStorageWriter.write_data

    def observe(self: SpikeDetector, step: int, *_arguments: Any) -> Spike | None:
        steps.append(step)
        return Spike(step, step, ("planted",)) if step == 6 and steps.count(6) == 1 else None

    def write(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        time.sleep(1)
        return write_data(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", write)
        patch.setattr(SpikeDetector, "observe", observe)
        outcome = train(settings)
    assert outcome.step == 6, outcome
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5, 6], steps


def test_a_rollback_waits_for_the_checkpoint_and_forgets_the_goal(settings_for: SettingsFor) -> None:
    settings = settings_for(
        parallel="fsdp", async_checkpoints=True, checkpoint_every=3, on_spike="rollback", rollback_steps=2,
        evaluate_every=6, stop_at_loss=99.0, log_every=5, monitor_every=0,
    )  # fmt: skip
    run_processes(train_while_saving_is_slow, 2, settings)
