import shutil

import pytest
import torch

from longshort.data import prepare, train_bpe
from longshort.training.config import TrainConfig
from longshort.training.loop import train
from longshort.training.trained import open_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with two checkpoints; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"text number {number} " * 20)
    prepare(f"{folder}/*.txt", folder / "data", validation_fraction=0.4)
    train(
        TrainConfig(
            "tiny", folder / "data", folder / "run", layers=1, hidden_size=16, heads=2, head_dim=8,
            sequence_length=16, batch_size=2, steps=4, checkpoint_every=2, evaluate_every=0,
        )
    )  # fmt: skip
    return folder / "run"


def test_the_latest_checkpoint_comes_ready_to_use(trained):
    from transformers import AutoModelForCausalLM

    opened = open_trained(trained)
    expected = AutoModelForCausalLM.from_pretrained(trained / "checkpoints" / "step-4").state_dict()
    weights = opened.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert opened.step == 4
    assert not opened.model.training
    assert opened.tokenizer.decode(opened.tokenizer.encode("naïve")) == "naïve"
    assert opened.config.training.steps == 4


def test_an_earlier_checkpoint_is_named_by_its_step(trained):
    from transformers import AutoModelForCausalLM

    opened = open_trained(trained, step=2)
    expected = AutoModelForCausalLM.from_pretrained(trained / "checkpoints" / "step-2").state_dict()
    weights = opened.model.state_dict()
    assert opened.step == 2
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    with pytest.raises(ValueError, match="has no checkpoint of step 3, only of 2, 4"):
        open_trained(trained, step=3)


def test_weights_of_another_model_are_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    config = run / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 24'))
    with pytest.raises(ValueError, match="does not fit"):
        open_trained(run)


def test_the_tokenizer_of_other_data_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    train_bpe(["other text"], 258).save_pretrained(run / "tokenizer")
    with pytest.raises(ValueError, match=r"is not the tokenizer of the data that .* was trained on"):
        open_trained(run)


def test_damaged_weights_are_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    weights = run / "checkpoints" / "step-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OSError, match="is damaged"):
        open_trained(run)


def test_a_run_without_checkpoints_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        open_trained(run)
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        open_trained(tmp_path)
