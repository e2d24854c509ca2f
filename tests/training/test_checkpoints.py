"""Checkpoints: exact, complete or absent, kept as many as asked."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from longshort.model import LongShortForCausalLM, preset
from longshort.training import checkpoints
from longshort.training.checkpoints import (
    TrainState,
    checkpoint_steps,
    keep_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_checkpoints,
    rewind,
    save_checkpoint,
)
from longshort.training.config import TrainConfig
from longshort.training.optimization import make_optimizer

SETTINGS = TrainConfig("tiny", Path("data"), Path("run"))


def trained_model(seed: int = 0, **options) -> tuple[LongShortForCausalLM, torch.optim.AdamW]:
    torch.manual_seed(seed)
    config = preset("tiny", hidden_size=16, num_attention_heads=2, head_dim=8, qk_norm=True, **options)
    model = LongShortForCausalLM(config).train()
    optimizer = make_optimizer(model, SETTINGS)
    take_steps(model, optimizer, 2)
    return model, optimizer


def take_steps(model: LongShortForCausalLM, optimizer: torch.optim.AdamW, count: int) -> None:
    for index in range(count):
        tokens = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()


def save(run: Path, step: int) -> Path:
    return save_checkpoint(run, *trained_model(), TrainState(step, 10 * step, 3))


def fresh_model() -> tuple[LongShortForCausalLM, torch.optim.AdamW]:
    torch.manual_seed(2)
    model = LongShortForCausalLM(
        preset("tiny", hidden_size=16, num_attention_heads=2, head_dim=8, qk_norm=True)
    )
    return model, make_optimizer(model, SETTINGS)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_training_goes_on_bit_by_bit(tmp_path: Path, options: dict) -> None:
    model, optimizer = trained_model(**options)
    state = TrainState(step=2, tokens=80, seed=3)
    folder = save_checkpoint(tmp_path, model, optimizer, state)
    assert folder == tmp_path / "checkpoints" / "step-2"
    other, other_optimizer = trained_model(seed=1, **options)
    assert load_checkpoint(folder, other, other_optimizer) == state
    for trained, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        take_steps(trained, its_optimizer, 3)
    for name, parameter in model.named_parameters():
        theirs = other.get_parameter(name)
        assert torch.equal(parameter, theirs), name
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[theirs][key]), (name, key)
            assert theirs.data_ptr() % 64 == 0


def test_the_state_before_the_first_step_comes_back(tmp_path: Path) -> None:
    model, optimizer = fresh_model()
    state = TrainState(0, 0, 3, spikes={"losses": []})
    folder = save_checkpoint(tmp_path, model, optimizer, state)
    other, other_optimizer = trained_model()
    assert load_checkpoint(folder, other, other_optimizer) == state
    assert not other_optimizer.state
    for trained, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        take_steps(trained, its_optimizer, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_rewinding_makes_an_earlier_checkpoint_the_start_of_another_attempt(tmp_path: Path) -> None:
    model, optimizer = trained_model()
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step, 10 * step, 3, spikes={"calm": {}}))
    rewind(tmp_path, 4, attempt=2, batches_skipped=30)
    assert names(tmp_path) == ["step-2", "step-4"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    expected = TrainState(4, 40, 3, attempt=2, batches_skipped=30, spikes={"calm": {}})
    assert load_checkpoint(latest, model, optimizer) == expected
    save_checkpoint(tmp_path, model, optimizer, replace(expected, step=6))
    assert names(tmp_path) == ["step-2", "step-4", "step-6"]


def test_other_checkpoints_than_those_to_keep_go(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-6" / "state.json").unlink()
    keep_checkpoints(tmp_path, [2, 8, 10])
    assert names(tmp_path) == ["step-2", "step-6", "step-8"]  # who knows what an incomplete one is


def test_folder_is_a_pretrained_model_and_plain_data(tmp_path: Path) -> None:
    model, optimizer = trained_model()
    folder = save_checkpoint(tmp_path, model, optimizer, TrainState(7, 70, 0))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    expected = {"step": 7, "tokens": 70, "seed": 0, "attempt": 0, "batches_skipped": 0, "spikes": None}
    assert json.loads((folder / "state.json").read_text()) == expected
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert "model.layers.0.attention.qkv_proj.weight.exp_avg_sq" in file.keys()  # noqa: SIM118
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_saving_shows_no_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    assert capfd.readouterr() == ("", "")


def test_latest_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    folders = {step: save(tmp_path, step) for step in (2, 10, 9)}
    assert latest_checkpoint(tmp_path) == folders[10]
    (folders[10] / "optimizer.safetensors").unlink()
    assert latest_checkpoint(tmp_path) == folders[9]
    shutil.copytree(folders[9], tmp_path / "checkpoints" / ".step-11.partial")
    (tmp_path / "checkpoints" / "step-12-copy").mkdir()
    assert latest_checkpoint(tmp_path) == folders[9]


def test_only_what_is_half_written_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    stripped = save(tmp_path, 2)
    (stripped / "optimizer.safetensors").unlink()  # a user wanted the weights alone
    (tmp_path / "checkpoints" / ".step-3.partial").mkdir()
    remove_partial_checkpoints(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert save(tmp_path, 2) == stripped
    assert latest_checkpoint(tmp_path) == stripped
    assert names(tmp_path) == ["step-1", "step-2"]


def test_complete_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(FileExistsError, match="step-1 exists already"):
        save(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == folder


def test_steps_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert checkpoint_steps(tmp_path) == [9, 10, 11]


def full_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(*_arguments: object, **_options: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("part", "failure"),
    [
        ("save_file", full_disk_in_safetensors),
        ("sync_tree", full_disk),
        ("json.dumps", full_disk),
        ("LongShortForCausalLM.save_pretrained", full_disk),
    ],
)
def test_full_disk_costs_only_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, failure: Callable[..., None]
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    model, optimizer = trained_model()
    if part.startswith("Long"):
        monkeypatch.setattr(LongShortForCausalLM, "save_pretrained", failure)
    else:
        monkeypatch.setattr(f"{checkpoints.__name__}.{part}", failure)
    message = r"the checkpoint of step 3 could not be written .*No space left on device.*are whole"
    with pytest.raises(OSError, match=message):
        save_checkpoint(tmp_path, model, optimizer, TrainState(3, 30, 0))
    monkeypatch.undo()
    assert names(tmp_path) == ["step-1", "step-2"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest, model, optimizer).step == 2


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    model, optimizer = trained_model(num_hidden_layers=3)
    with pytest.raises(ValueError, match="does not fit the model of this run"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    (folder / name).write_bytes(b"damaged")
    with pytest.raises(OSError, match="is damaged"):
        load_checkpoint(folder, *trained_model())
