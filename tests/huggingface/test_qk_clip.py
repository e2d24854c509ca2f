"""QK-clip of any decoder: the rows of each head are found, a trial verifies them, and only they are
scaled."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.huggingface.watched_decoders import make_decoder, make_llama, tokens
from torch import nn

from longshort.huggingface import LogitMonitor, QKClip, qk_clip
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
def test_finding_and_trying_change_nothing(family: str) -> None:
    model = make_decoder(family)
    next(model.parameters()).requires_grad_(False)
    next(model.get_decoder().children()).eval()
    before, random_state = weights(model), torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    clip = QKClip(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {layer.keys is not None for layer in clip._layers} == {family in OWN_KEYS}
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
        ValueError, match=r"layers\.\d\.self_attn \(Qwen3\w*Attention\): its .* QK-norm undoes such scaling"
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


def adapted(seed: int = 0, **settings: Any) -> Any:
    """A decoder with an adapter; its base is always the same."""
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False, **settings)
    base = make_llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
@pytest.mark.parametrize("group_size", [1, 2])
def test_a_checkpoint_of_dora_holds_the_clip(tmp_path: Path, group_size: int) -> None:
    base = make_llama(num_key_value_heads=4 // group_size)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    base.model.layers[0].self_attn.q_proj.bias = base.model.layers[1].self_attn.q_proj.bias = None
    model = peft.get_peft_model(base, config)
    before = logits(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    clip = QKClip(model, min(before[0]))
    assert clip.apply(before) >= 4
    assert all(
        torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen
    )
    assert clip.frozen_factors == [[1.0] * 4] * 2
    assert logits(model)[0] == pytest.approx([min(before[0])] * 4, rel=1e-5)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.model.layers[0].self_attn.q_proj.bias = again.model.layers[1].self_attn.q_proj.bias = None
    loaded = peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    assert logits(loaded) == logits(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
def test_a_checkpoint_of_lora_lacks_the_clip_which_is_said_and_can_be_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(qk_clip.logger, "warning", messages.append)
    model = adapted()
    before = logits(model)
    threshold = sorted(before[0])[1]
    clip = QKClip(model, threshold)
    assert clip.apply([[threshold] * 4] * 2) == 0 and messages == []
    clip.apply([before[0], [0.0] * 4])
    clip.apply([[2 * threshold, 0.0, 0.0, 0.0], [0.0] * 4])  # a head may be clipped again
    assert len(messages) == 1 and "frozen weights of layers.0.self_attn" in messages[0]
    expected = [min(1.0, threshold / logit) for logit in before[0]]
    expected[0] *= 0.5
    assert clip.frozen_factors == [pytest.approx(expected), [1.0] * 4]

    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path), is_trainable=True)
    wanted = logits(model)
    assert logits(loaded)[0] != pytest.approx(wanted[0], rel=1e-3)  # a part of the clip is missing
    restored = QKClip(loaded, threshold)
    restored.restore_frozen(clip.frozen_factors)
    assert logits(loaded)[0] == pytest.approx(wanted[0], rel=1e-5)
    QKClip(loaded, threshold).restore_frozen(clip.frozen_factors)  # has them already
    assert logits(loaded)[0] == pytest.approx(wanted[0], rel=1e-5)
    assert logits(model.merge_and_unload())[0] == pytest.approx(wanted[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
def test_a_merged_adapter_starts_anew() -> None:
    model = adapted()
    before = logits(model)
    QKClip(model, min(before[0])).apply(before)
    merged = model.merge_and_unload()
    again = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["q_proj"]))
    assert QKClip(again).frozen_factors == [[1.0] * 4] * 2


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

    class Elsewhere(nn.Module):
        """Queries that are no function of the layer's own weights."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    foreign = make_llama()
    foreign.model.layers[0].self_attn.q_proj = Elsewhere()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn .* not made by weights of one head alone"):
        QKClip(foreign)
    sharded = make_llama()
    sharded.model.norm.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight sharded"):
        QKClip(sharded)


def assert_clips(model: Any) -> None:
    """Assert that clips of the first layer's heads give the threshold, with others unchanged."""
    before = logits(model)
    threshold = sum(before[0]) / len(before[0]) if len(before[0]) > 1 else before[0][0] / 2
    QKClip(model, threshold).apply([before[0], [0.0] * len(before[1])])
    assert logits(model)[0] == pytest.approx([min(logit, threshold) for logit in before[0]], rel=1e-4)


def make(name: str, **settings: Any) -> Any:
    """A decoder with keys of each head, and weights that are far from a new model's."""
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**shape, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0).add_(0.1 * torch.randn_like(parameter))
    return model


def test_queries_of_zeros_are_tried_too() -> None:
    normed, plain, partly = make("Qwen3", head_dim=8), make_llama(), make_llama()
    wanted = plain.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        for layer in normed.model.layers:
            layer.self_attn.q_proj.weight.zero_()
        for parameter in plain.model.layers[0].self_attn.q_proj.parameters():
            parameter.zero_()
        partly.model.layers[0].self_attn.q_proj.weight[:8] = 0.0
    zero = normed.model.layers[1].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="QK-norm undoes such scaling"):
        QKClip(normed)
    assert not zero.any()
    QKClip(partly)
    clip = QKClip(plain, 1.0)
    weight = plain.model.layers[0].self_attn.q_proj.weight
    assert not weight.any()
    with torch.no_grad():
        weight.copy_(wanted)
    clip.apply([[4.0, 0.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(weight[:8], wanted[:8] / 4)


def test_keys_that_have_other_uses_are_left_alone() -> None:
    as_values, of_layers = make("Llama"), make("Llama")
    attention = as_values.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    first, second = (layer.self_attn for layer in of_layers.model.layers)
    second.k_proj = first.k_proj
    for model, has_keys in ((as_values, [False, True]), (of_layers, [False, False])):
        assert [layer.keys is not None for layer in QKClip(model)._layers] == has_keys
        assert_clips(model)


def test_queries_that_have_other_uses_are_refused_by_name() -> None:
    in_mlp, of_layers, as_keys, as_output = (make("Llama") for _ in range(4))
    in_mlp.model.layers[0].mlp.up_proj = in_mlp.model.layers[0].self_attn.q_proj
    of_layers.model.layers[1].self_attn.q_proj = of_layers.model.layers[0].self_attn.q_proj
    as_keys.model.layers[0].self_attn.k_proj.weight = as_keys.model.layers[0].self_attn.q_proj.weight
    as_output.model.layers[0].self_attn.o_proj.weight = as_output.model.layers[0].self_attn.q_proj.weight
    for model in (in_mlp, of_layers, as_keys, as_output):
        before = weights(model)
        with pytest.raises(
            ValueError, match=r"got layers\.0\.self_attn \(L\w+\): its q_proj\.weight has other uses"
        ):
            QKClip(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_values_must_stay_as_they_are() -> None:
    """A layer whose values come from its keys, by no weight of their own."""
    model = make("Llama")
    attention = model.model.layers[0].self_attn

    class KeysOfLastCall(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention.k_proj(x)

    attention.v_proj = KeysOfLastCall()
    assert [layer.keys is not None for layer in QKClip(model)._layers] == [False, True]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
def test_layers_of_one_head() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=1, n_positions=64)
    transposed = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in transposed.parameters():
            parameter.mul_(6.0).add_(0.1 * torch.randn_like(parameter))
    assert find_projections(transposed)[0].queries[0][0].indices.tolist() == list(range(32))
    assert_clips(transposed)
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    assert_clips(peft.get_peft_model(make_llama(num_attention_heads=1, num_key_value_heads=1), lora))


@pytest.mark.parametrize(
    ("name", "settings"), [("Cohere", {"use_qk_norm": True}), ("StableLm", {"qk_layernorm": True})]
)
def test_gains_of_each_head_are_scaled_where_a_norm_undoes_all_else(
    name: str, settings: dict[str, Any]
) -> None:
    model = make(name, **settings)
    before = weights(model)
    assert_clips(model)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all("norm" in key for key in changed)


def test_clipped_queries_are_not_called_normalised() -> None:
    with pytest.raises(ValueError, match="queries do not scale with their weights, as if they were clipped"):
        QKClip(make("Olmo", clip_qkv=0.5))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
def test_parameters_must_stay_the_same_objects() -> None:
    replaced, model = make_llama(), adapted()
    clips = [QKClip(replaced, 1.0), QKClip(model, 1.0)]
    replaced.load_state_dict(weights(replaced), assign=True)
    model.merge_and_unload()
    for clip in clips:
        with pytest.raises(ValueError, match=r"got others in layers\.0\.self_attn.*make another QKClip"):
            clip.apply([[2.0] * 4] * 2)
    with pytest.raises(ValueError, match="make another QKClip"):
        clips[1].restore_frozen([[0.5] * 4] * 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number > 0, got 0"):
        QKClip(make_llama(), 0)
    clip = QKClip(make_llama())
    with pytest.raises(ValueError, match=r"max_logit_by_head must have \[4, 4\] heads by layer, got \[4\]"):
        clip.apply([[1.0] * 4])
    with pytest.raises(ValueError, match="model must have adapters of PEFT"):
        clip.restore_frozen([[1.0] * 4] * 2)
    with pytest.raises(ValueError, match=r"factors must have \[4, 4\] heads by layer, got \[\]"):
        clip.restore_frozen([])
