import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longshort.data import Batches, DataFolder, prepare
from longshort.reporting.files import strict_json
from longshort.stability.rounding import AUDITED
from longshort.training.audit import audit_trained
from longshort.training.config import TrainConfig
from longshort.training.loop import train
from longshort.training.trained import TrainedModel, open_trained


def make_run(folder: Path, **settings: Any) -> tuple[TrainedModel, DataFolder]:
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"text number {number} and words that repeat " * 20)
    prepare(f"{folder}/*.txt", folder / "data", validation_fraction=0.4)
    given: dict[str, Any] = {
        "layers": 2, "hidden_size": 16, "heads": 2, "head_dim": 8, "sequence_length": 16, "batch_size": 4,
        "window": 4, "steps": 4, "checkpoint_every": 2, "evaluate_every": 0, "tensorboard": False,
        "learning_rate": 0.01, **settings,
    }  # fmt: skip
    train(TrainConfig("tiny", folder / "data", folder / "run", **given))
    return open_trained(folder / "run"), DataFolder.open(folder / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedModel, DataFolder]:
    return make_run(tmp_path_factory.mktemp("audited"), attention_precision="bf16", micro_batch_size=2)


def test_the_gradients_are_those_of_the_training(run: tuple[TrainedModel, DataFolder]) -> None:
    trained, data = run
    found = audit_trained(trained, data, batches=3, batch_size=4, seed=5, precisions=["bf16"])
    drawn = Batches(data.train, 16, 4, 5)
    config = trained.config
    biases = []
    for step in range(3):
        gradients = []
        for precision in ("fp64", "bf16"):
            settings = {**config.model, "attention_precision": precision}
            model = replace(config, model=settings).build_model()
            model.load_state_dict(trained.model.state_dict())
            batch = drawn.batch(step)
            logits = model(batch.input_ids, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
            weight: Any = model.get_parameter("model.layers.1.attention.qkv_proj.weight")
            gradients.append(weight.grad[16:32].double())  # the rows of the keys
        true, rounded = gradients
        biases.append(((rounded - true) * true).sum() / true.square().sum())
    (error,) = [e for e in found["errors"] if (e["layer"], e["matrix"]) == (1, "k")]
    assert error["bias"] == pytest.approx(torch.stack(biases).mean().item(), rel=1e-3)


def test_the_settings_come_back_as_json(run: tuple[TrainedModel, DataFolder]) -> None:
    trained, data = run
    found = audit_trained(trained, data, batches=2)
    assert json.loads(strict_json(found)) == found
    errors = found.pop("errors")
    assert found == {
        "step": 4, "split": "train", "batches": 2, "batch_size": 2, "sequence_length": 16, "seed": 0,
        "precision": "fp32", "attention_precision": "bf16", "left_out": {},
    }  # fmt: skip
    assert [error["precision"] for error in errors] == [name for name in AUDITED for _ in range(4)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "validation"}, {"batch_size": 3}], ids=str)
def test_the_batches_are_fixed_and_follow_the_settings(
    run: tuple[TrainedModel, DataFolder], change: dict[str, Any]
) -> None:
    trained, data = run
    given: dict[str, Any] = {"batches": 2, "precisions": ["bf16"]}
    first, again, other = (audit_trained(trained, data, **given, **more) for more in ({}, {}, change))
    assert first == again
    assert first["errors"] != other["errors"]


def test_autocast_of_the_run_applies_to_all_but_attention(tmp_path: Path) -> None:
    trained, data = make_run(tmp_path, precision="bf16", steps=2)
    found = audit_trained(trained, data, batches=2, precisions=["fp32", "bf16"])
    noise = {e["precision"]: e["noise"] for e in found["errors"] if (e["layer"], e["matrix"]) == (1, "q")}
    assert noise["fp32"] < noise["bf16"]
    full = replace(trained, config=replace(
        trained.config, training=replace(trained.config.training, precision="fp32")
    ))  # fmt: skip
    assert audit_trained(full, data, batches=2, precisions=["bf16"])["errors"] != found["errors"][4:]


def test_what_the_run_does_not_allow_is_left_out_and_refused_by_name(tmp_path: Path) -> None:
    trained, data = make_run(tmp_path, separate_documents=True, softcap=5.0, steps=2)
    found = audit_trained(trained, data, batches=2)
    assert list(found["left_out"]) == ["sdpa-bf16"]
    assert {error["precision"] for error in found["errors"]} == {"fp32", "bf16", "bf16-flash"}
    with pytest.raises(ValueError, match="'sdpa-bf16' does not go with --separate-documents"):
        audit_trained(trained, data, precisions=["sdpa-bf16"])
    together = replace(trained, config=replace(
        trained.config, training=replace(trained.config.training, separate_documents=False)
    ))  # fmt: skip
    assert "softcap=5.0" in audit_trained(together, data, batches=2)["left_out"]["sdpa-bf16"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size must be an integer in 1"),
        ({"batches": 1}, "the number of batches must be an integer >= 2, got 1"),
        ({"seed": -1}, "seed must be an integer in 0"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            audit_trained(trained, data, **bad)
