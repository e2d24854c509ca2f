"""The spectral entropy of updates of queries and keys, of any decoder and in its training by the Trainer."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.huggingface.test_spike_callback import make_trainer
from tests.huggingface.watched_decoders import make_decoder, make_llama
from torch import Tensor

from longshort.huggingface.callbacks import LogitCallback
from longshort.huggingface.spike_callback import SpikeCallback
from longshort.huggingface.update_entropy import update_entropy_of
from longshort.stability import SpikeDetector

HEADS, HEAD_DIM = 4, 8


def separate(attention: Any) -> tuple[Tensor, Tensor]:
    return attention.q_proj.weight, attention.k_proj.weight


def transposed(attention: Any) -> tuple[Tensor, Tensor]:
    q, k, _ = attention.c_attn.weight.T.chunk(3)
    return q, k


def interleaved(attention: Any) -> tuple[Tensor, Tensor]:
    by_head = attention.query_key_value.weight.unflatten(0, (HEADS, 3, HEAD_DIM))
    return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)


WEIGHTS: dict[str, Any] = {
    "llama": lambda model: separate(model.model.layers[0].self_attn),
    "qwen3": lambda model: separate(model.model.layers[0].self_attn),  # a norm over each head, left out
    "gpt2": lambda model: transposed(model.transformer.h[0].attn),
    "gpt-neox": lambda model: interleaved(model.gpt_neox.layers[0].attention),
}


def products(model: Any, family: str) -> list[Tensor]:
    """Copy W_Qᵀ·W_K of each head of the first layer, in float64."""
    q, k = (weights.detach().double().unflatten(0, (-1, HEAD_DIM)) for weights in WEIGHTS[family](model))
    return list(q.mT @ k.repeat_interleave(HEADS // len(k), 0))


@pytest.mark.parametrize("family", WEIGHTS)
def test_the_entropy_is_that_of_the_plain_products(family: str) -> None:
    model = make_decoder(family)
    measured = update_entropy_of(model)
    before = products(model, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = measured.measure()[0]
    for entropy, old, new in zip(found, before, products(model, family), strict=True):
        shares = torch.linalg.svdvals(new - old)
        shares = shares / shares.sum()
        assert entropy == pytest.approx(torch.special.entr(shares).sum().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
@pytest.mark.parametrize("family", ["olmo2", "deepseek-v3", "LoRA"])
def test_heads_without_a_matrix_of_their_own_are_refused(family: str) -> None:
    if family == "LoRA":
        model: Any = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    else:
        model = make_decoder(family)
    with pytest.raises(ValueError, match=r"one matrix for the queries of each head .* layers\.0\.self_attn"):
        update_entropy_of(model)


def watched(folder: Path, bound: float, resume: str | None = None) -> tuple[list[Any], list[Any]]:
    """Train, and return the entropies in the file, and the spikes."""
    logits = LogitCallback(every=3, file=folder / "metrics.jsonl", update_entropy=True)
    spikes = SpikeCallback("report", SpikeDetector(alarm="update", alarm_bound=bound), logits=logits)
    trainer, _ = make_trainer(folder, logits, spikes, max_steps=9, save_steps=4, logging_steps=1)
    trainer.train(resume_from_checkpoint=resume)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        line["update_entropy_by_head"] for line in lines if "update_entropy_by_head" in line
    ], spikes.spikes


def test_the_alarm_for_updates_is_raised_and_continues_from_a_checkpoint(tmp_path: Path) -> None:
    whole, spikes = watched(tmp_path, bound=1e-9)
    assert len(whole) == 4 and whole[0] == [[None] * HEADS]  # nothing had changed before the first step
    assert all(0 < entropy < 4 for layer in whole[1] for entropy in layer)
    assert "update" in spikes[0]["reasons"][0]
    resumed, _ = watched(tmp_path, bound=1e-9, resume=str(tmp_path / "checkpoint-4"))
    assert resumed == whole
