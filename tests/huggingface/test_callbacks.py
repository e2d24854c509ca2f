"""Callbacks of the Trainer: logits in its logs and in a file, QK-clip, z-loss."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.huggingface.watched_decoders import make_decoder, make_llama, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longshort.huggingface import LogitMonitor
from longshort.huggingface.callbacks import LogitCallback, QKClipCallback, ZLossCallback, attach
from longshort.stability import z_loss

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft

DATA: Any = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=48, length=12)]


class Logger(TrainerCallback):
    """What TensorBoard and its like would see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append({**kwargs["logs"], "step": state.global_step})


def make_trainer(model: Any, folder: Path, **settings: Any) -> tuple[Any, Logger]:
    logger = Logger()
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    } | settings  # fmt: skip
    arguments = TrainingArguments(str(folder), **options)
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[logger]), logger


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_logs_and_file_hold_the_logits(tmp_path: Path) -> None:
    model, file = make_decoder("gemma2"), tmp_path / "new" / "metrics.jsonl"
    trainer, logger = make_trainer(model, tmp_path)
    callback = LogitCallback(every=3, file=file)
    attach(trainer, callback)
    first, batches = copy.deepcopy(model), []
    step: Any = trainer.training_step
    recorded: Any = lambda model, batch, *args: batches.append(batch) or step(model, batch, *args)  # noqa: E731
    trainer.training_step = recorded
    before = dict(ALL_ATTENTION_FUNCTIONS)
    trainer.train()
    assert dict(ALL_ATTENTION_FUNCTIONS) == before

    records = lines(file)
    assert [record["step"] for record in records] == [1, 3, 6]
    logged = {log["step"]: log for log in logger.logs if "loss" in log}
    for record in records:
        log = logged[record["step"]]
        for name in ("max_logit", "max_logit_local", "max_logit_global", "row_range", "loss", "grad_norm"):
            assert record[name] == log[name]
        assert record["max_logit"] == max(max(heads) for heads in record["max_logit_by_head"])
        assert [len(heads) for heads in record["entropy_by_head"]] == [4, 4]
        assert record["max_logit_global_in_band"] is None
    assert logged[2]["max_logit"] == logged[1]["max_logit"]  # as last measured
    assert logged[3]["max_logit"] != logged[1]["max_logit"]
    assert trainer.state.log_history[0]["max_logit"] == logged[1]["max_logit"]
    assert callback.reading_step == 6

    with torch.no_grad(), LogitMonitor(first) as monitor:
        first(**batches[0])
    assert monitor.reading().max_logit_by_head == records[0]["max_logit_by_head"]
    plain, _ = make_trainer(make_decoder("gemma2"), tmp_path)
    plain.train()
    assert losses(plain) == losses(trainer)  # bit for bit


def test_all_micro_batches_of_a_step_count(tmp_path: Path) -> None:
    found = []
    for settings in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):
        file = tmp_path / f"{len(found)}.jsonl"
        trainer, _ = make_trainer(make_llama(), tmp_path, max_steps=1, **settings)
        attach(trainer, LogitCallback(file=file))
        trainer.train()
        found.append(lines(file)[0]["max_logit_by_head"])
    for whole, parts in zip(*found, strict=True):
        assert whole == pytest.approx(parts, rel=1e-6)


def test_a_file_is_never_overwritten_and_continued_on_resuming(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    trainer, _ = make_trainer(make_llama(), tmp_path / "run", save_strategy="steps", save_steps=3)
    attach(trainer, LogitCallback(every=2, file=file))
    trainer.train()
    whole = file.read_text()
    trainer, _ = make_trainer(make_llama(), tmp_path / "other")
    attach(trainer, LogitCallback(every=2, file=file))
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl exists already"):
        trainer.train()
    assert file.read_text() == whole

    file.write_text(whole + '{"step": 7, "hal')  # a killed process
    trainer, _ = make_trainer(make_llama(), tmp_path / "run", save_strategy="steps", save_steps=3)
    attach(trainer, LogitCallback(every=2, file=file))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert file.read_text() == whole


def test_an_error_in_the_training_leaves_other_passes_alone(tmp_path: Path) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    trainer, _ = make_trainer(make_llama(), tmp_path)
    callback = LogitCallback(every=1)
    attach(trainer, callback)
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (_ for _ in ()).throw(KeyError("mine"))
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    trainer.training_step = step
    trainer.train()  # starts over
    assert callback.reading_step == 6
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_clip_keeps_the_logits_at_the_threshold(tmp_path: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(20)
    trainer, logger = make_trainer(model, tmp_path, learning_rate=1e-5)
    attach(trainer, LogitCallback(every=1), QKClipCallback(threshold=2.0))
    trainer.train()
    logs = [log for log in logger.logs if "loss" in log]
    assert logs[0]["max_logit"] > 20
    assert logs[0]["qk_clipped"] >= 1
    assert logs[2]["max_logit"] < 3  # of other batches
    trainer, logger = make_trainer(make_llama(), tmp_path)
    attach(trainer, QKClipCallback())  # all logits are below 100
    trainer.train()
    plain, _ = make_trainer(make_llama(), tmp_path)
    plain.train()
    assert losses(plain) == losses(trainer)
    assert all(log["qk_clipped"] == 0 for log in logger.logs if "loss" in log)


def test_qk_norm_stops_the_training_before_it_begins(tmp_path: Path) -> None:
    trainer, logger = make_trainer(make_decoder("qwen3"), tmp_path)
    attach(trainer, QKClipCallback())
    with pytest.raises(ValueError, match="QK-norm undoes such scaling"):
        trainer.train()
    assert logger.logs == []


@pytest.mark.parametrize("accumulated", [1, 2])
def test_z_loss_is_added_in_training_alone(tmp_path: Path, accumulated: int) -> None:
    model, weight = make_llama(), 0.5
    plain, _ = make_trainer(
        copy.deepcopy(model), tmp_path, gradient_accumulation_steps=accumulated, max_steps=1
    )
    plain.train()
    trainer, _ = make_trainer(
        copy.deepcopy(model), tmp_path, gradient_accumulation_steps=accumulated, max_steps=1,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    attach(trainer, ZLossCallback(weight))
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(accumulated), strict=False)]
    trainer.train()
    terms = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        terms.append(z_loss(logits[:, :-1], batch["labels"][:, 1:]).item())
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0] + weight * sum(terms) / len(terms), rel=1e-5)
    evaluated = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    batch = {name: torch.stack([entry[name] for entry in DATA[:4]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert evaluated == pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-5)
    assert not trainer.model._forward_hooks  # removed at the end


def test_z_loss_needs_labels_in_the_model(tmp_path: Path) -> None:
    trainer, _ = make_trainer(make_llama(), tmp_path, label_smoothing_factor=0.1)
    attach(trainer, ZLossCallback())
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trainer.train()


def test_all_together_with_lora_and_checkpointing(tmp_path: Path) -> None:
    """The numbers and the clipped heads are those without gradient checkpointing, bit for bit."""
    histories = []
    for checkpointing in (False, True):
        model = make_llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(10)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        trainer, logger = make_trainer(
            peft.get_peft_model(model, config), tmp_path, activation_checkpointing=checkpointing,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        attach(trainer, LogitCallback(every=2), QKClipCallback(threshold=3.0), ZLossCallback())
        trainer.train()
        names = ("step", "loss", "grad_norm", "max_logit", "row_range", "qk_clipped")
        histories.append([[log[name] for name in names] for log in logger.logs if "loss" in log])
    assert histories[0] == histories[1]
    assert histories[0][0][-1] > 0


def lora_training(folder: Path, steps: int, **settings: Any) -> Any:
    """A training of LoRA in a model whose first heads are clipped at every step; the same each time."""
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(10)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    trainer, _ = make_trainer(
        peft.get_peft_model(model, config), folder, max_steps=steps, save_strategy="steps", save_steps=3,
        **settings,
    )  # fmt: skip
    attach(trainer, QKClipCallback(threshold=3.0))
    return trainer


def all_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(first: Any, second: Any) -> None:
    for name, weight in all_weights(first).items():
        torch.testing.assert_close(weight, all_weights(second)[name], rtol=1e-5, atol=1e-7)


def test_a_clipped_lora_training_resumes_with_the_same_model(tmp_path: Path) -> None:
    """Checkpoints hold the adapter alone, whereas the clip has scaled the base too."""
    whole = lora_training(tmp_path, 6)
    at_three: list[Any] = []
    save = whole._save_checkpoint
    whole._save_checkpoint = lambda model, trial: (at_three.append(copy.deepcopy(model)), save(model, trial))
    whole.train()
    resumed = lora_training(tmp_path, 6)  # as in a new process
    base = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(all_weights(at_three[0])[base], all_weights(resumed.model)[base])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert_same_weights(resumed.model, whole.model)

    again = losses(whole)  # back in the same process, as a rollback does
    whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(whole) == pytest.approx(again, rel=1e-5)
    assert_same_weights(resumed.model, whole.model)


def test_the_best_clipped_lora_model_is_loaded_whole(tmp_path: Path) -> None:
    trainer = lora_training(
        tmp_path, 6, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=1.0,
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated[0] > evaluated[1]  # so the best, by our order, is not the last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[0], rel=1e-5)


def test_clip_can_join_a_training_that_resumes(tmp_path: Path) -> None:
    trainer, _ = make_trainer(make_llama(), tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    trainer, logger = make_trainer(make_llama(), tmp_path, save_strategy="steps", save_steps=3)
    attach(trainer, QKClipCallback(threshold=1.0))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "checkpoint-6").is_dir()
    assert [log["step"] for log in logger.logs if "qk_clipped" in log] == [4, 5, 6]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        LogitCallback(every=0)
    with pytest.raises(ValueError, match="threshold must be a finite number > 0, got -1"):
        QKClipCallback(-1)
    with pytest.raises(ValueError, match="weight must be a finite number > 0, got 0"):
        ZLossCallback(0)
    with pytest.raises(TypeError, match="trainer must be a Trainer of transformers, got str"):
        attach("trainer", LogitCallback())  # type: ignore[arg-type]
    trainer, _ = make_trainer(make_llama(), tmp_path)
    with pytest.raises(TypeError, match="callbacks must be instances of TrainerCallback"):
        attach(trainer, LogitCallback)  # type: ignore[arg-type]
