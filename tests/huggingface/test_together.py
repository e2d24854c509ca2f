"""Layouts, LoRA, checkpointing, padding, monitors and QK-clip in one training of transformers' Trainer."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.huggingface.watched_decoders import Truth, make_llama, tokens, truth
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longshort.huggingface import LogitMonitor, apply, layouts_of
from longshort.huggingface.callbacks import LogitCallback, QKClipCallback, ZLossCallback, attach

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft

LENGTH, WINDOW, SINKS = 20, 5, 2
HEADS = 4
"""The query heads: the first two are local and share a KV head, the last two are global and share another."""
PLANTED = 1
"""The head whose queries are made large in the first layer."""
THRESHOLD = 3.0


def make_base(planted: float = 1.0) -> Any:
    model = make_llama()
    apply(model, num_global_heads=2, window=WINDOW, sink_tokens=SINKS)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[8 * PLANTED : 8 * PLANTED + 8] *= planted
    return model


def with_lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, config)


def padded_examples() -> list[dict[str, Tensor]]:
    """Four sequences with 0 to 6 tokens of padding, at the left and at the right in turn."""
    examples = []
    for index, ids in enumerate(tokens(batch=4, length=LENGTH)):
        mask = torch.ones_like(ids)
        if index:
            mask[slice(0, 2 * index) if index % 2 else slice(LENGTH - 2 * index, None)] = 0
        labels = ids.masked_fill(mask == 0, -100)
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


def make_trainer(model: Any, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3,
        "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True,
    } | settings  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=padded_examples())  # type: ignore[arg-type]
    attach(trainer, *callbacks)
    return trainer


def checkpointing(reentrant: bool) -> dict[str, Any]:
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


def logged(trainer: Trainer, *names: str) -> list[list[float]]:
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Gradients(TrainerCallback):
    """The gradients of each step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


class Calls(TrainerCallback):
    """The queries and keys of each step, by layer, each call once although checkpointing makes it twice."""

    def __init__(self) -> None:
        self.steps: list[dict[int, list[tuple[Tensor, Tensor, Tensor]]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({})

    def add(self, layer: int, q: Tensor, k: Tensor, mask: Tensor) -> None:
        if not self.steps:
            return  # trials before the training
        known = self.steps[-1].setdefault(layer, [])
        if not any(torch.equal(q, other) for other, _, _ in known):
            known.append((q.detach().clone(), k.detach().clone(), mask.clone()))


@contextmanager
def captured(calls: Calls) -> Iterator[None]:
    original = ALL_ATTENTION_FUNCTIONS["longshort"]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        calls.add(module.layer_idx, q, k, mask)
        return original(module, q, k, v, mask, **options)

    ALL_ATTENTION_FUNCTIONS["longshort"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["longshort"]  # an assignment would hide what is registered later


def visible_pairs(is_token: Tensor) -> Tensor:
    """Which pairs a layer with our layout and padding shows, (batch, heads, queries, keys), by loops."""
    batch, length = is_token.shape
    visible = torch.zeros(batch, HEADS, length, length, dtype=torch.bool)
    for entry in range(batch):
        places = is_token[entry].nonzero()[:, 0].tolist()
        for query in places:
            for key in places:
                near = query - key < WINDOW or key in places[:SINKS]
                visible[entry, :2, query, key] = key <= query and near
                visible[entry, 2:, query, key] = key <= query
    return visible


def truth_of_step(calls: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Truth:
    """The maxima and the mean over the rows of all passes of a step."""
    found = [
        truth(q.to(dtype), k.to(dtype), visible_pairs(ids[:, 0, 0] >= 0), q.shape[3] ** -0.5)
        for q, k, ids in calls
    ]
    rows = [int((ids[:, 0, 0] >= 0).sum()) for _, _, ids in calls]
    entropies = [
        sum(value * count for value, count in zip(values, rows, strict=True)) / sum(rows)
        for values in zip(*(part.entropy for part in found), strict=True)
    ]
    maxima, ranges = (
        [max(values) for values in zip(*(getattr(part, name) for part in found), strict=True)]
        for name in ("max_logit", "row_range")
    )
    return Truth(maxima, entropies, ranges)


@pytest.mark.parametrize("reentrant", [True, False])
def test_monitors_read_what_float64_gives_and_agree(tmp_path: Path, reentrant: bool) -> None:
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    calls = Calls()
    with captured(calls):
        monitors = [LogitCallback(every=1, file=file) for file in files]
        callbacks = [*monitors, QKClipCallback(THRESHOLD), ZLossCallback(), calls]
        make_trainer(with_lora(make_base(10.0)), tmp_path, *callbacks, **checkpointing(reentrant)).train()
    assert files[0].read_text() == files[1].read_text()
    records = lines(files[0])
    assert len(records) == len(calls.steps) == 3
    for record, step in zip(records, calls.steps, strict=True):
        assert {layer: len(passes) for layer, passes in step.items()} == {0: 2, 1: 2}
        for layer, passes in step.items():
            exact, plain = (truth_of_step(passes, dtype) for dtype in (torch.float64, torch.float32))
            for name in ("max_logit", "entropy", "row_range"):
                wanted, rounded, found = (
                    torch.tensor(values, dtype=torch.float64)
                    for values in (
                        getattr(exact, name),
                        getattr(plain, name),
                        record[f"{name}_by_head"][layer],
                    )
                )
                slack = 2 * torch.finfo(torch.float32).eps * wanted.abs().max()
                error = (found - wanted).abs().max()
                assert error <= 2 * (rounded - wanted).abs().max() + slack, (name, layer)


@pytest.mark.parametrize("settings", [{}, checkpointing(True), checkpointing(False)])
def test_watching_changes_no_bit_of_losses_and_gradients(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for watchers in ([], [LogitCallback(every=1), LogitCallback(every=2)]):
        gradients = Gradients()
        trainer = make_trainer(with_lora(make_base()), tmp_path, *watchers, gradients, **settings)
        trainer.train()
        found.append((logged(trainer, "loss", "grad_norm"), gradients.steps))
    (plain_logs, plain), (watched_logs, watched) = found
    assert plain_logs == watched_logs
    assert len(plain) == 3 and len(plain[0]) == 2 * 3 * 2  # layers · projections · (A, B)
    for step, other in zip(plain, watched, strict=True):
        assert step.keys() == other.keys()
        assert all(torch.equal(step[name], other[name]) for name in step)
        assert all(gradient.abs().max() > 0 for gradient in step.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_planted_head_is_clipped_to_the_threshold_and_others_are_not(
    tmp_path: Path, reentrant: bool
) -> None:
    """With a learning rate of 0 and all examples in each step, nothing but the clip changes the logits."""
    file = tmp_path / "metrics.jsonl"
    model = with_lora(make_base(20.0))
    trainer = make_trainer(
        model, tmp_path, LogitCallback(every=1, file=file), QKClipCallback(THRESHOLD), learning_rate=0.0,
        max_steps=2, **checkpointing(reentrant),
    )  # fmt: skip
    trainer.train()
    before, after = (record["max_logit_by_head"] for record in lines(file))
    assert before[0][PLANTED] > 5 * THRESHOLD
    assert after[0] == pytest.approx([min(logit, THRESHOLD) for logit in before[0]], rel=1e-5)
    assert sum(logit > THRESHOLD for logit in before[0]) < HEADS
    clipped = [int(count) for (count,) in logged(trainer, "qk_clipped")]
    assert clipped[0] == sum(logit > THRESHOLD for layer in before for logit in layer)


def test_layouts_survive_an_adapter_that_is_saved_and_merged(tmp_path: Path) -> None:
    base = make_base(20.0)
    layouts = layouts_of(base)
    base.save_pretrained(tmp_path / "base")
    example = padded_examples()[1]
    batch = {name: example[name][None] for name in ("input_ids", "attention_mask")}

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(**batch).logits[example["attention_mask"][None] == 1]

    plain = make_trainer(with_lora(copy.deepcopy(base)), tmp_path, LogitCallback(), **checkpointing(False))
    plain.train()
    plain.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    assert layouts_of(loaded.get_base_model()) == layouts
    assert torch.equal(logits(loaded), logits(plain.model))

    clipped = make_trainer(with_lora(base), tmp_path, QKClipCallback(THRESHOLD), **checkpointing(False))
    clipped.train()
    trained: Any = clipped.model
    wanted = logits(trained)
    trained.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert layouts_of(merged) == layouts
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), LogitMonitor(merged) as monitor:
        merged(**batch)
    assert monitor.reading().max_logit_by_head[0][PLANTED] < 1.5 * THRESHOLD  # the rate is not 0
