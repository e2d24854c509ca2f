"""Healing: the loss comes back, weights are replaced only at the end, interruptions change nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longshort.cli import main
from longshort.conversion import healing, short_training
from longshort.conversion.healing import HealSettings, heal
from longshort.conversion.losses import mean_loss
from longshort.conversion.short_training import ShortTraining
from longshort.data import DataFolder, validation_windows
from longshort.huggingface import layouts_of

SMALL = {"steps": 6, "minutes": None, "sequence_length": 48, "held_out": 2, "full_budget": True}


@pytest.fixture
def data(text, tmp_path):
    """A folder of texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = text.read_text().splitlines(keepends=True)
    for number in range(8):
        (folder / f"{number}.txt").write_text("".join(lines[50 * number : 50 * (number + 1)]))
    return folder


def settings(model: Path, data: Path, **changes) -> HealSettings:
    return HealSettings(**{"model": model, "data": data, **SMALL, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_the_loss_falls_and_the_healed_weights_are_in_place(converted, data):
    before = weights(converted)
    result = heal(settings(converted, data, steps=12, learning_rate=3e-3))
    first, last = result.healed.lines[0]["held_out_loss"], result.healed.last_held_out
    assert last < first - 0.3
    assert result.is_complete
    assert result.healed.step == 12

    model = AutoModelForCausalLM.from_pretrained(converted)
    assert layouts_of(model) is not None
    assert not same(weights(converted), before)
    assert same(weights(converted / "unhealed"), before)
    assert layouts_of(AutoModelForCausalLM.from_pretrained(converted / "unhealed")) == layouts_of(model)
    content = json.loads((converted / "healing" / "outcome.json").read_text())
    assert (content["converted_loss"], content["healed_loss"]) == (first, last)
    with pytest.raises(FileExistsError, match="is healed already"):
        heal(settings(converted, data))


def test_losses_are_those_of_the_models(original, converted, data):
    result = heal(settings(converted, data))
    folder = converted / "healing" / "data"
    batch = validation_windows(DataFolder.open(folder).validation, 48, 2)
    windows = torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)

    def loss(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        return mean_loss(model, windows)

    assert result.original == pytest.approx(loss(original), abs=1e-5)
    assert result.healed.lines[0]["held_out_loss"] == pytest.approx(loss(converted / "unhealed"), abs=1e-5)
    assert result.healed.last_held_out == pytest.approx(loss(converted), abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=["all", "lora"])
def test_the_losses_are_those_of_weights_that_are_rounded(converted, data, changes):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    model.save_pretrained(converted)
    result = heal(settings(converted, data, reference=True, learning_rate=1e-2, **changes))
    assert {x.dtype for x in weights(converted).values()} == {torch.bfloat16}

    batch = validation_windows(DataFolder.open(converted / "healing" / "data").validation, 48, 2)
    windows = torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)
    saved = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    truth = mean_loss(saved, windows)
    assert result.healed.last_held_out == pytest.approx(truth, abs=1e-6)
    content = json.loads((converted / "healing" / "outcome.json").read_text())
    assert content["healed_loss"] == result.healed.last_held_out == content["lines"][-1]["held_out_loss"]
    assert result.reference is not None and len(result.reference.lines) == len(result.healed.lines)


@pytest.mark.parametrize(
    ("changes", "has_dropout"),
    [({}, False), ({"lora": 2}, False), ({}, True)],
    ids=["all", "lora", "dropout"],
)
def test_an_interruption_changes_no_bit(converted, data, tmp_path, monkeypatch, changes, has_dropout):
    if has_dropout:
        token_logits = ShortTraining._loss

        def dropped(self, batch, row):
            embeddings = self._model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda _m, _i, out: torch.dropout(out, 0.5, train=True))
            try:
                return token_logits(self, batch, row)
            finally:
                hook.remove()

        monkeypatch.setattr(ShortTraining, "_loss", dropped)
    whole = shutil.copytree(converted, tmp_path / "whole")
    heal(settings(whole, data, **changes))

    before = weights(converted)
    step = ShortTraining._step

    def interrupted(self, now, *args):
        now = step(self, now, *args)
        if now.step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return now

    monkeypatch.setattr(ShortTraining, "_step", interrupted)
    result = heal(settings(converted, data, **changes))
    assert not result.is_complete
    assert result.healed.step == 3
    assert same(weights(converted), before)
    monkeypatch.setattr(ShortTraining, "_step", step)
    torch.manual_seed(7)  # another process would have another state
    assert heal(settings(converted, data, **changes)).is_complete
    assert same(weights(converted), weights(whole))


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=["all", "lora"])
def test_the_end_may_be_interrupted_too(converted, data, tmp_path, monkeypatch, changes):
    whole = shutil.copytree(converted, tmp_path / "whole")
    heal(settings(whole, data, **changes))
    before = weights(converted)

    def fail(*_args):
        raise OSError("the disk is full")

    monkeypatch.setattr(healing, "_content", fail)  # after the weights were replaced
    with pytest.raises(OSError, match="full"):
        heal(settings(converted, data, **changes))
    monkeypatch.undo()
    assert heal(settings(converted, data, **changes)).is_complete
    assert same(weights(converted), weights(whole))
    assert same(weights(converted / "unhealed"), before)
    assert not list((converted / "healing").rglob("*.safetensors"))


def test_after_a_mistake_in_the_data_it_begins_with_the_right_one(converted, data, tmp_path):
    (tmp_path / "short").mkdir()
    for name in "ab":
        (tmp_path / "short" / f"{name}.txt").write_text("too short")
    with pytest.raises(ValueError):
        heal(settings(converted, tmp_path / "short"))
    assert heal(settings(converted, data)).is_complete


def test_it_stops_when_the_loss_is_back(converted, data):
    result = heal(settings(converted, data, steps=50, full_budget=False, until_rise=100.0))
    assert result.healed.step == 50 // 8  # the first measurement
    assert result.is_complete


def test_a_budget_of_time_becomes_steps(converted, data, monkeypatch):
    clock = iter(float(second) for second in range(10**6))  # each look at the clock takes a second
    monkeypatch.setattr(short_training.time, "perf_counter", lambda: next(clock))
    result = heal(settings(converted, data, steps=None, minutes=2.0, reference=True))
    assert result.is_complete
    assert result.reference is not None
    lines = (result.healed.lines, result.reference.lines)
    assert len({tuple(line.get("learning_rate") for line in each) for each in lines}) == 1
    planned = result.healed.planned
    assert planned is not None
    assert result.healed.step == planned
    assert 60 < result.healed.seconds <= 125  # the last measurement may end a little later
    rates = [line["learning_rate"] for line in result.healed.lines[1:]]
    assert rates[-1] < 0.25 * max(rates)
    assert max(rates) <= 1e-4


def test_the_original_is_trained_as_long(original, converted, data):
    result = heal(settings(converted, data, reference=True))
    reference = result.reference
    assert reference is not None
    assert reference.step == result.healed.step
    assert reference.lines[0]["held_out_loss"] == pytest.approx(result.original, abs=1e-5)
    assert reference.last_held_out < result.original
    steps = [[line["step"] for line in lines] for lines in (reference.lines, result.healed.lines)]
    assert steps[0] == steps[1]
    assert [line.get("learning_rate") for line in reference.lines] == [
        line.get("learning_rate") for line in result.healed.lines
    ]


def test_distillation_alone_approaches_the_teacher(original, converted, data):
    teacher = AutoModelForCausalLM.from_pretrained(original).eval()

    def divergence() -> float:
        model = AutoModelForCausalLM.from_pretrained(converted).eval()
        ids = torch.tensor([list(b"line 7 of a text, 49 letters\nline 8 of a text, 64 letters\n")])
        with torch.no_grad():
            ours, wanted = (m(ids).logits.log_softmax(-1) for m in (model, teacher))
        return torch.nn.functional.kl_div(ours, wanted, reduction="sum", log_target=True).item() / ids.numel()

    before = divergence()
    heal(
        settings(
            converted, data, steps=80, batch_size=4, distill=original, distill_weight=1.0, learning_rate=3e-3
        )
    )
    assert divergence() < 0.8 * before


def test_lora_trains_factors_alone_and_leaves_an_ordinary_model(converted, data):
    before = weights(converted)
    heal(settings(converted, data, lora=2, learning_rate=1e-2))
    after = weights(converted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    for name in changed:
        rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)
        assert rank <= 2


def test_other_settings_do_not_resume(converted, data, monkeypatch):
    monkeypatch.setattr(ShortTraining, "run", lambda self, *args, **options: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        heal(settings(converted, data))
    with pytest.raises(ValueError, match="was begun with another learning_rate"):
        heal(settings(converted, data, learning_rate=1.0))


def test_a_loss_that_is_not_finite_is_an_error(converted, data):
    before = weights(converted)
    with pytest.raises(ValueError, match="try a smaller learning_rate"):
        heal(settings(converted, data, steps=30, learning_rate=1e30))
    assert same(weights(converted), before)


def test_data_of_another_tokenizer_is_refused(converted, data, tmp_path, fails):
    other = tmp_path / "bpe"
    assert main(["data", str(data), "--out", str(other), "--tokenizer", "bpe", "--vocab-size", "300"]) == 0
    with pytest.raises(ValueError, match="must be made with the tokenizer of"):
        heal(settings(converted, other))


def test_a_data_folder_of_ours_is_used(converted, data, tmp_path):
    folder = tmp_path / "data"
    assert main(["data", str(data), "--out", str(folder), "--tokenizer", str(converted)]) == 0
    assert heal(settings(converted, folder)).is_complete
    assert not (converted / "healing" / "data").exists()


def test_a_model_without_layouts_is_refused(original, data, tmp_path):
    model = shutil.copytree(original, tmp_path / "model")
    with pytest.raises(ValueError, match="must be a converted model"):
        heal(settings(model, data))
    assert not (model / "healing").exists()


def test_the_command(converted, data, capsys):
    options = ["--steps", "4", "--sequence-length", "32", "--held-out", "2", "--reference", "--full-budget"]
    assert main(["heal", str(converted), "--data", str(data), *options]) == 0
    shown = capsys.readouterr().out
    for name in ("original", "converted", "healed", "original, trained as long"):
        assert name in shown
    assert "4 steps" in shown
    assert (converted / "healing" / "report.html").read_text().count("data:image/png") == 1


def test_a_report_that_was_not_written_is_made_of_the_outcome(converted, data, monkeypatch, capsys, fails):
    options = ["--steps", "3", "--sequence-length", "32", "--held-out", "2", "--reference", "--full-budget"]
    arguments = ["heal", str(converted), "--data", str(data), *options]

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("longshort.cli.heal.write_healing", interrupted)
        assert main(arguments) == 130
    healed = weights(converted)
    report = converted / "healing" / "report.html"
    assert not report.exists()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "original, trained as long" in shown
    assert "3 steps" in shown
    assert report.exists()
    assert same(weights(converted), healed)
    assert "is healed already" in fails(1, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be"),
        (["--minutes", "0"], "--minutes must be"),
        (["--lora", "0"], "--lora must be"),
        (["--distill-weight", "1.5"], "--distill-weight must be"),
    ],
)
def test_bad_flags_are_usage_errors(fails, options, message):
    assert message in fails(2, "heal", "model", "--data", "data", *options)


def test_the_card_has_the_losses_of_the_healing(converted, data):
    result = heal(settings(converted, data, reference=True))
    card: Any = ModelCard.load(converted / "README.md")
    (healed,) = card.data.eval_results
    assert (healed.metric_value, healed.dataset_name) == (result.healed.last_held_out, "texts")
    assert result.reference is not None
    for loss, of in (
        (result.original, "the original"),
        (result.healed.lines[0]["held_out_loss"], "the converted model before the training"),
        (result.reference.last_held_out, "the original, trained as long"),
    ):
        assert f"| {loss:.4f} | {of} |" in card.text
    assert "| optimizer steps | 6 |" in card.text and str(data.parent) not in str(card)


def test_a_card_that_was_changed_stays(converted, data):
    (converted / "README.md").write_text("Mine.")
    heal(settings(converted, data))
    assert (converted / "README.md").read_text() == "Mine."
