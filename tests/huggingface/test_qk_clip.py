"""QK-clip of any decoder: the rows of each head are found, a trial verifies them, and only they are
scaled."""

import math
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.huggingface.watched_decoders import make_decoder, make_llama, tokens
from torch import nn

from longshort.huggingface import LogitMonitor, QKClip
from longshort.huggingface.projections import find_projections

CLIPPED = ["llama", "mistral", "gemma2", "gpt2", "gpt-neox", "phi3", "gpt-oss", "olmo2", "deepseek-v3"]
OWN_KEYS = ("gpt2", "gpt-neox")
"""Families here whose query heads share no KV head; those of DeepSeek share a part of the keys."""


def logits(model: Any) -> list[list[float]]:
    with torch.no_grad(), LogitMonitor(model) as monitor:
        model(tokens(), use_cache=False)
    return monitor.reading().max_logit_by_head


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", CLIPPED)
def test_a_clipped_head_has_the_threshold_and_others_keep_theirs(family: str) -> None:
    model = make_decoder(family)
    before = logits(model)
    threshold = sorted(before[0])[1]  # two or three heads of the first layer are above
    clip = QKClip(model, threshold)
    clipped = clip.apply([before[0], [0.0] * len(before[1])])
    assert clipped == sum(logit > threshold for logit in before[0]) >= 2
    assert logits(model)[0] == pytest.approx([min(logit, threshold) for logit in before[0]], rel=1e-5)
    assert clip.apply([[threshold] * 4, [0.0] * len(before[1])]) == 0


@pytest.mark.parametrize("family", ["olmo2", "gpt-neox", "deepseek-v3"])
def test_each_head_alone_is_clipped_to_the_threshold_and_the_rest_keeps_every_bit(family: str) -> None:
    model = make_decoder(family)
    before, state = logits(model), weights(model)
    for head, logit in enumerate(before[0]):
        QKClip(model, 0.5 * logit).apply(
            [[0.0] * head + [logit] + [0.0] * (3 - head), [0.0] * len(before[1])]
        )
        after = logits(model)[0]
        assert after.pop(head) == pytest.approx(0.5 * logit, rel=1e-6)
        assert after == before[0][:head] + before[0][head + 1 :]
        model.load_state_dict(state)


@pytest.mark.parametrize("family", CLIPPED)
def test_keys_are_scaled_only_where_a_head_has_them_for_itself(family: str) -> None:
    model = make_decoder(family)
    clip = QKClip(model, 1.0)
    kinds = {layer.scales_keys for layer in clip._layers}
    assert kinds == {family in OWN_KEYS}


@pytest.mark.parametrize("family", CLIPPED)
def test_finding_and_trying_change_nothing(family: str) -> None:
    model = make_decoder(family)
    next(model.parameters()).requires_grad_(False)
    next(model.get_decoder().children()).eval()
    before, random_state = weights(model), torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    QKClip(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert frozen == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_healthy_heads_keep_every_bit() -> None:
    model = make_decoder("gpt2")
    before = weights(model)
    clip = QKClip(model, 10.0)
    assert clip.apply([[10.0, math.nan, math.inf, 0.0], [1.0, 40.0, 1.0, 1.0]]) == 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"}
    ratio = model.transformer.h[1].attn.c_attn.weight / before["transformer.h.1.attn.c_attn.weight"]
    expected = torch.ones(96)
    expected[8:16] = expected[32 + 8 : 32 + 16] = 0.5  # sqrt(10/40), queries and keys of head 1
    torch.testing.assert_close(ratio, expected.expand_as(ratio))


def test_rows_of_each_kind_of_projection() -> None:
    def rows(family: str, head: int) -> list[tuple[str, int, list[int]]]:
        model = make_decoder(family)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = find_projections(model)[0].queries[head]
        return [(names[id(r.parameter)].split(".", 4)[-1], r.dim, r.indices.tolist()) for r in found]

    eight = list(range(8, 16))
    assert rows("llama", 1) == [("q_proj.weight", 0, eight), ("q_proj.bias", 0, eight)]
    assert rows("gpt2", 1) == [("c_attn.weight", 1, eight), ("c_attn.bias", 0, eight)]
    interleaved = list(range(24, 32))  # query, key and value of a head lie together
    assert rows("gpt-neox", 1) == [
        ("query_key_value.weight", 0, interleaved),
        ("query_key_value.bias", 0, interleaved),
    ]
    assert rows("phi3", 1) == [("qkv_proj.weight", 0, eight)]
    assert rows("olmo2", 1) == [("q_norm.weight", 0, eight)]  # normalises all heads together
    assert rows("deepseek-v3", 1) == [("q_b_proj.weight", 0, list(range(12, 24)))]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-next"])
def test_qk_norm_is_refused_by_measurement(family: str) -> None:
    model = make_decoder(family)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"layers\.\d\.self_attn \(Qwen3\w*Attention\), where a trial found none"
    ):
        QKClip(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_scales_base_and_adapter(use_dora: bool) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False, use_dora=use_dora)
    model = peft.get_peft_model(make_llama(), config)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = logits(model)
    threshold = min(before[0])
    QKClip(model, threshold).apply([before[0], [0.0] * 4])
    assert logits(model)[0] == pytest.approx([threshold] * 4, rel=1e-5)
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_bf16_weights() -> None:
    model = make_llama().to(torch.bfloat16)
    before = logits(model)
    QKClip(model, min(before[0])).apply([before[0], [0.0] * 4])
    assert logits(model)[0] == pytest.approx([min(before[0])] * 4, rel=0.03)


def test_what_cannot_be_clipped_is_refused() -> None:
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"must look up its attention in .* got FalconForCausalLM"):
        QKClip(falcon)
    shared = make_llama()
    shared.model.layers[1].self_attn.q_proj = shared.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=r"must not share query weights, got layers\.0.* and layers\.1"):
        QKClip(shared)

    class Elsewhere(nn.Module):
        """Queries that are no function of the layer's own weights."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    foreign = make_llama()
    foreign.model.layers[0].self_attn.q_proj = Elsewhere()
    with pytest.raises(ValueError, match=r"got layers\.0\.self_attn"):
        QKClip(foreign)
    sharded = make_llama()
    sharded.model.norm.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight sharded"):
        QKClip(sharded)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number > 0, got 0"):
        QKClip(make_llama(), 0)
    clip = QKClip(make_llama())
    with pytest.raises(ValueError, match=r"max_logit_by_head must have \[4, 4\] heads by layer, got \[4\]"):
        clip.apply([[1.0] * 4])
