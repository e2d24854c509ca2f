"""A run from beginning to end, what it writes and tells, and what it refuses."""

import json
import math
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tests.training.runs import Recorder, SettingsFor, assert_close_metrics, losses, without_speed

from longshort.data import DataFolder, prepare, validation_windows
from longshort.evaluation import generate_text
from longshort.model import LongShortForCausalLM
from longshort.stability import ROW_RANGES
from longshort.training.checkpoints import latest_checkpoint
from longshort.training.loop import resume, train
from longshort.training.metrics import TENSORBOARD_FOLDER, read_metrics
from longshort.training.run import read_run
from longshort.training.trained import open_trained

EVERY_LINE = ["step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"]
GROUPS = ["max_logit", "max_logit_local", "max_logit_global", "max_logit_global_in_band"]
BY_HEAD = ["max_logit_by_head", "entropy_by_head"]


def test_run_writes_what_was_measured_when_it_was(settings_for: SettingsFor) -> None:
    settings = settings_for(tensorboard=True)
    recorder = Recorder()
    outcome = train(settings, recorder)
    assert (outcome.run, outcome.step, outcome.steps, outcome.exit_code) == (settings.out, 12, 12, 0)
    records = read_metrics(settings.out)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["tokens"] for record in records] == [step * 4 * 48 for step in range(1, 13)]
    for record in records:
        step = record["step"]
        keys = EVERY_LINE + GROUPS + (BY_HEAD if step in (1, 4, 8, 12) else [])
        assert list(record) == keys + (["validation_loss"] if step in (6, 12) else [])
        assert all(math.isfinite(record[name]) for name in EVERY_LINE)
    assert torch.tensor(records[3]["entropy_by_head"]).shape == (2, 4)
    assert records[3]["max_logit"] == torch.tensor(records[3]["max_logit_by_head"]).max().item()
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert sorted(path.name for path in (settings.out / "checkpoints").iterdir()) == [
        "step-10",
        "step-12",
        "step-5",
    ]
    assert (settings.out / "tokenizer" / "tokenizer.json").is_file()
    assert any((settings.out / TENSORBOARD_FOLDER).iterdir())
    assert recorder.starts == [0]
    assert recorder.steps == list(enumerate(records, start=1))
    assert recorder.messages == []


def test_the_probe_measures_validation_windows_by_head(settings_for: SettingsFor) -> None:
    settings = settings_for(probe=True, tensorboard=True, micro_batch_size=2)
    train(settings)
    plain = settings_for("plain", micro_batch_size=2)
    train(plain)
    for record, without in zip(read_metrics(settings.out), read_metrics(plain.out), strict=True):
        assert record["loss"] == without["loss"]
        assert record.get("validation_loss") == pytest.approx(without.get("validation_loss"))
        assert ("probe" in record) == ("copying_loss" in record) == ("validation_loss" in record)
    last = read_metrics(settings.out)[-1]
    assert list(last["probe"]) == [
        "max_logit", "quantile", "row_range", "max_logit_in_band", "quantile_in_band", "row_range_in_band"
    ]  # fmt: skip
    assert torch.tensor(list(last["probe"].values())).shape == (6, 2, 4)
    assert 0 < last["copying_loss"] < 20


@pytest.mark.parametrize("is_first", [True, False])
def test_a_run_ends_at_the_loss_it_is_to_reach(settings_for: SettingsFor, is_first: bool) -> None:
    plain = settings_for()
    train(plain)
    first, last = (line["validation_loss"] for line in read_metrics(plain.out) if "validation_loss" in line)
    goal = first + 1e-6 if is_first else (first + last) / 2
    settings = settings_for("goal", stop_at_loss=goal)
    outcome = train(settings)
    end = 6 if is_first else 12
    assert (outcome.step, outcome.signal, outcome.exit_code) == (end, None, 0)
    assert without_speed(settings.out) == without_speed(plain.out)[:end]
    assert (settings.out / "checkpoints" / f"step-{end}").is_dir()
    assert resume(settings.out).step == end
    assert without_speed(settings.out) == without_speed(plain.out)[:end]


def test_lines_come_when_logged_monitored_or_evaluated_and_at_the_end(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=11, log_every=5, monitor_every=4, evaluate_every=6, validation_windows=1)
    recorder = Recorder()
    train(settings, recorder)
    records = {record["step"]: record for record in read_metrics(settings.out)}
    assert list(records) == [1, 4, 5, 6, 8, 10, 11]
    assert [step for step, record in records.items() if "max_logit_by_head" in record] == [1, 4, 8, 11]
    for step, measured in ((5, 4), (6, 4), (10, 8)):  # as last measured
        assert [records[step][name] for name in GROUPS] == [records[measured][name] for name in GROUPS]
    assert [step for step, record in records.items() if "validation_loss" in record] == [6, 11]
    assert [step for step, record in recorder.steps if record is None] == [2, 3, 7, 9]


def test_monitor_and_validation_can_be_off(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=3, monitor_every=0, evaluate_every=0)
    train(settings)
    assert all(list(record) == EVERY_LINE for record in read_metrics(settings.out))


def test_row_ranges_are_measured_where_asked_for(settings_for: SettingsFor) -> None:
    settings = settings_for(monitor_row_range=True, steps=5)
    train(settings)
    for record in read_metrics(settings.out):
        is_monitored = record["step"] in (1, 4, 5)
        assert [name for name in record if name in ROW_RANGES] == list(ROW_RANGES if is_monitored else ())
        if is_monitored:
            assert 0 < record["row_range_global_in_band"] <= record["row_range"] <= 2 * record["max_logit"]


@pytest.mark.parametrize("token_order", ["permuted", "interleaved"])
def test_token_order_reaches_training_and_validation(settings_for: SettingsFor, token_order: str) -> None:
    settings = settings_for("ordered", token_order=token_order, interleave=3, steps=2, evaluate_every=2)
    text = settings_for("text", steps=2, evaluate_every=2)
    train(settings)
    train(text)
    assert losses(settings.out)[0] != losses(text.out)[0]  # the weights are equal still
    trained, data = open_trained(settings.out), DataFolder.open(settings.data)
    windows = validation_windows(
        data.validation, 48, settings.validation_windows, token_order=settings.token_order, interleave=3
    )
    with torch.no_grad():
        loss = trained.model(windows.input_ids, shift_labels=windows.labels).loss.item()
    assert read_metrics(settings.out)[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_other_token_orders_need_whole_validation_windows(settings_for: SettingsFor) -> None:
    validation = DataFolder.open(settings_for().data).validation
    changes = {"token_order": "permuted", "sequence_length": len(validation)}
    with pytest.raises(ValueError, match=f"validation.bin has {len(validation)} tokens; sequence_length"):
        train(settings_for(**changes))
    train(settings_for(**changes, evaluate_every=0, steps=1, batch_size=1))


@pytest.mark.parametrize("monitor_every", [0, 3])
def test_qk_clip_keeps_the_logits_down(settings_for: SettingsFor, monitor_every: int) -> None:
    free = settings_for("free", steps=10, monitor_every=1, learning_rate=3e-2)
    clipped = settings_for("clipped", steps=10, monitor_every=monitor_every, learning_rate=3e-2, qk_clip=0.5)
    for settings in (free, clipped):
        train(settings)
    lines, free_lines = read_metrics(clipped.out), read_metrics(free.out)
    assert free_lines[-1]["max_logit"] > 2
    assert "qk_clipped" not in free_lines[0]
    first = next(line["step"] for line in lines if line["qk_clipped"])
    over = [line["step"] for line in free_lines if line["max_logit"] > 0.5]
    assert first == over[0]  # every step is measured, whatever monitor_every says
    assert losses(clipped.out)[:first] == losses(free.out)[:first]
    assert losses(clipped.out)[-1] != losses(free.out)[-1]
    by_head = [line["step"] for line in lines if "max_logit_by_head" in line]
    assert by_head == ([1, 3, 6, 9, 10] if monitor_every else [])
    if monitor_every:
        assert lines[-1]["max_logit"] < free_lines[-1]["max_logit"] / 2


def test_qk_clip_needs_a_model_without_qk_norm(settings_for: SettingsFor, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"qk_norm": true}')
    with pytest.raises(ValueError, match="--qk-clip does not go with --qk-norm"):
        train(settings_for(preset=str(tmp_path / "model.json"), qk_clip=1.0))
    assert not (tmp_path / "run").exists()


def test_sinks_and_convolutions_train_and_generate(settings_for: SettingsFor) -> None:
    settings = settings_for(sink_logits=True, short_convolution=3, separate_documents=True)
    train(settings)
    trained = open_trained(settings.out)
    assert losses(settings.out)[-1] < losses(settings.out)[0] - 0.5
    text = generate_text(trained.model, trained.tokenizer, "the", max_new_tokens=5, temperature=0)
    assert "".join(text)
    weights = trained.model.state_dict()
    assert weights["model.layers.0.attention.sink_logits"].abs().max() > 0
    assert weights["model.layers.0.attention.short_convolution.weight"][:, 1:].abs().max() > 0


def test_mhsa_has_global_heads_alone_and_the_bands_logit(settings_for: SettingsFor) -> None:
    settings = settings_for(mhsa=True, monitor_every=1, steps=3)
    train(settings)
    for record in read_metrics(settings.out):
        assert record["max_logit_local"] is None
        assert 0 < record["max_logit_global_in_band"] <= record["max_logit_global"] == record["max_logit"]
    assert read_run(settings.out).band == 8


def test_same_settings_give_the_same_losses_and_another_seed_others(settings_for: SettingsFor) -> None:
    runs = [settings_for(name, steps=5, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for settings in runs:
        train(settings)
    first, again, other = (losses(settings.out) for settings in runs)
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"monitor_every": 1}, {"monitor_every": 0, "evaluate_every": 1}],
    ids=["gradient checkpointing", "watched at every step", "evaluated at every step"],
)
def test_what_must_not_change_losses_does_not(settings_for: SettingsFor, changes: dict) -> None:
    plain, changed = settings_for("plain", steps=6), settings_for("changed", **{"steps": 6, **changes})
    train(plain)
    train(changed)
    assert losses(changed.out) == losses(plain.out)


def test_gradient_checkpointing_recomputes(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longshort.model.decoder import LongShortMLP

    passes = []
    forward = LongShortMLP.forward
    monkeypatch.setattr(LongShortMLP, "forward", lambda self, x: passes.append(1) or forward(self, x))
    counts = []
    for name, checkpointing in (("plain", False), ("recomputed", True)):
        passes.clear()
        train(settings_for(name, steps=1, evaluate_every=0, gradient_checkpointing=checkpointing))
        counts.append(len(passes))
    assert counts == [2, 4]


def test_bf16_and_separate_documents_train(settings_for: SettingsFor) -> None:
    common = {"steps": 6, "sequence_length": 384}  # so long that some hold the end of a document
    plain = settings_for("plain", **common)
    train(plain)
    for name, changes in (("bf16", {"precision": "bf16"}), ("cut", {"separate_documents": True})):
        settings = settings_for(name, **common, **changes)
        train(settings)
        assert losses(settings.out) != losses(plain.out)
        assert losses(settings.out) == pytest.approx(losses(plain.out), rel=0.02)


# The compiler itself looks at .grad of what enters its graph behind the monitor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_equals_eager(settings_for: SettingsFor, checkpointing: bool) -> None:
    eager = settings_for("eager", steps=8, monitor_every=2)
    compiled = settings_for(
        "compiled", steps=8, monitor_every=2, compile=True, gradient_checkpointing=checkpointing
    )
    train(eager)
    train(compiled)
    assert_close_metrics(compiled.out, eager.out, rel=1e-4)


def test_only_as_many_checkpoints_are_kept(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=9, checkpoint_every=2, keep_checkpoints=2)
    train(settings)
    assert sorted(path.name for path in (settings.out / "checkpoints").iterdir()) == ["step-8", "step-9"]


def test_a_diverged_run_goes_on_after_a_break(settings_for: SettingsFor) -> None:
    settings = settings_for(
        learning_rate=1e30, warmup_steps=0, grad_clip=0, steps=8, checkpoint_every=6, tensorboard=True
    )
    train(settings)
    shutil.rmtree(settings.out / "checkpoints" / "step-8")
    assert resume(settings.out).step == 8
    assert [record["step"] for record in read_metrics(settings.out)] == list(range(1, 9))


def test_a_validation_split_shorter_than_a_sequence_is_measured_too(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("short text" * (20 if name == "a" else 2))
    prepare(tmp_path / "*.txt", tmp_path / "small", validation_fraction=0.01)
    settings = settings_for(
        data=tmp_path / "small", steps=2, evaluate_every=2, batch_size=2, sequence_length=20
    )
    train(settings)
    assert read_metrics(settings.out)[-1]["validation_loss"] > 0


def test_divergence_is_reported_and_does_not_stop_the_run(settings_for: SettingsFor) -> None:
    settings = settings_for(learning_rate=1e30, warmup_steps=0, grad_clip=0, steps=6, monitor_every=1)
    recorder = Recorder()
    assert train(settings, recorder).step == 6
    records = read_metrics(settings.out)
    assert math.isfinite(records[0]["loss"])
    assert records[-1]["loss"] is None
    assert records[-1]["max_logit"] is None
    first = next(record["step"] for record in records if record["loss"] is None)
    assert recorder.messages == [f"the loss is not finite at step {first}; the run continues"]
    last = recorder.steps[-1][1]
    assert last is not None
    assert math.isnan(last["loss"])
    assert math.isnan(last["max_logit"])
    latest = latest_checkpoint(settings.out)
    assert latest is not None
    assert latest.name == "step-6"
    for line in (settings.out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))


def test_existing_run_is_refused_and_untouched(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=2)
    train(settings)
    before = {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="--out"):
        train(settings)
    assert {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 10**6}, "sequence_length"),
        ({"device": "cuda"}, "--device: got cuda"),
        ({"heads": 3, "kv_heads": 2}, "num_key_value_heads"),
    ],
)
def test_wrong_settings_touch_no_file(
    settings_for: SettingsFor, tmp_path: Path, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train(settings_for(**changes))
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_signals_are_put_back(settings_for: SettingsFor) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(settings_for(steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_setting_reaches_the_config_of_the_run(settings_for: SettingsFor) -> None:
    settings = settings_for(steps=1)
    train(settings)
    written = json.loads((settings.out / "config.json").read_text())
    assert list(written) == ["training", "model", "band", "data", "versions", "document_start"]
    assert list(written["training"]) == [field.name for field in fields(settings)]


def test_the_model_can_be_prepared(settings_for: SettingsFor) -> None:
    """Before the first step, and again on resuming, when the checkpoint's weights come after."""
    seen: list[float] = []

    def prepare_model(model: LongShortForCausalLM) -> None:
        seen.append(model.lm_head.weight.abs().sum().item())
        model.lm_head.weight.data.zero_()

    settings = settings_for(steps=3)
    train(settings, prepare_model=prepare_model)
    assert losses(settings.out)[0] == pytest.approx(math.log(257), abs=1e-5)  # all logits are 0
    weight = open_trained(settings.out).model.lm_head.weight
    resume(settings.out, steps=4, prepare_model=prepare_model)
    assert losses(settings.out)[3] < math.log(257) - 1e-3 and weight.abs().sum() > 0
    assert len(seen) == 2 and seen[0] == seen[1] > 0
