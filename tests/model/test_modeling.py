"""`LongShortForCausalLM`: its weights and its function, padded, packed and cached."""

import math
from typing import Any

import pytest
import torch
from tests.model.models import CACHED_SHAPES, SHAPES, VOCAB, make_config, make_ids, make_model
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longshort.layers import ATTENTION_PRECISIONS, LongShortAttention
from longshort.model import LongShortConfig, LongShortForCausalLM


def plain_logits(weights: dict[str, Tensor], config: LongShortConfig, ids: Tensor) -> Tensor:
    """The model in plain maths from its named weights, head by head, in float64."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    w = {name: weight.double() for name, weight in weights.items()}
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = ids.shape[1]
    x = w["model.embed_tokens.weight"][ids]
    if config.position_embedding == "learned":
        x = x + w["model.embed_positions.weight"][:length]
    frequencies = config.rope_theta ** (-torch.arange(0, dim, 2).double() / dim)
    angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)[None]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for layer, layout in enumerate(config.head_layouts()):
        prefix = f"model.layers.{layer}."
        normed = norm(x, prefix + "attention_norm.weight")
        qkv = normed @ w[prefix + "attention.qkv_proj.weight"].T
        if config.short_convolution is not None:
            taps = w[prefix + "attention.short_convolution.weight"].flip(-1)[:, None]
            padded = torch.nn.functional.pad(qkv.mT, (config.short_convolution - 1, 0))
            qkv = torch.nn.functional.conv1d(padded, taps, groups=len(taps)).mT
        qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, dim))
        outputs = []
        for head, window in enumerate(layout.windows):
            kv_head = head * kv_heads // heads
            q, k, v = qkv[:, :, head], qkv[:, :, heads + kv_head], qkv[:, :, heads + kv_heads + kv_head]
            if config.qk_norm:
                q = norm(q, prefix + "attention.q_norm.weight")
                k = norm(k, prefix + "attention.k_norm.weight")
            kind = config.position_embedding
            if window is None and config.global_position_embedding is not None:
                kind = config.global_position_embedding
            if kind == "rope":
                q, k = apply_rotary_pos_emb(q[:, None], k[:, None], angles.cos(), angles.sin())
                q, k = q[:, 0], k[:, 0]
            scores = q @ k.mT / math.sqrt(dim)
            if config.softcap is not None:
                scores = config.softcap * torch.tanh(scores / config.softcap)
            if kind == "alibi":
                scores = scores - 2 ** (-8 * (head + 1) / heads) * distance.abs()
            seen = distance >= 0
            if window is not None:
                seen = seen & ((distance < window) | (torch.arange(length) < config.sink_tokens))
            scores = scores.masked_fill(~seen, -math.inf)
            if config.sink_logits:
                sink = w[prefix + "attention.sink_logits"][head].expand(*scores.shape[:-1], 1)
                scores = torch.cat([scores, sink], -1)
            outputs.append(scores.softmax(-1)[..., :length] @ v)
        x = x + torch.cat(outputs, -1) @ w[prefix + "attention.o_proj.weight"].T
        up = norm(x, prefix + "mlp_norm.weight") @ w[prefix + "mlp.up_proj.weight"].T
        x = x + (up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))) @ w[prefix + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_logits_equal_plain_maths_over_the_named_weights(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    logits = model(make_ids()).logits
    assert logits.shape == (2, 13, VOCAB) and logits.std() > 0.5
    expected = plain_logits(model.state_dict(), model.config, make_ids())
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)


def test_names_of_the_weights() -> None:
    plain = (
        "attention_norm",
        "attention.qkv_proj",
        "attention.o_proj",
        "mlp_norm",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    qk_norm = ("attention.q_norm", "attention.k_norm")

    def expected(in_block: tuple[str, ...], outside: tuple[str, ...]) -> list[str]:
        blocks = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in in_block]
        return sorted(f"{name}.weight" for name in (*blocks, *outside))

    ends = ("model.embed_tokens", "model.norm", "lm_head")
    assert sorted(make_model().state_dict()) == expected(plain, (*ends, "model.embed_positions"))
    for kind in ("rope", "alibi", "none"):
        model = make_model(qk_norm=True, position_embedding=kind)
        assert sorted(model.state_dict()) == expected((*plain, *qk_norm), ends)
    both = make_model(sink_logits=True, short_convolution=2)
    assert both.state_dict().keys() - make_model().state_dict().keys() == {
        f"model.layers.{layer}.attention.{name}"
        for layer in (0, 1)
        for name in ("sink_logits", "short_convolution.weight")
    }


@pytest.mark.parametrize("drawn", [False, True], ids=["new", "drawn"])
def test_initial_weights(drawn: bool) -> None:
    torch.manual_seed(0)
    model = LongShortForCausalLM(
        LongShortConfig(
            vocab_size=500, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, qk_norm=True,
            max_position_embeddings=300, sink_logits=True, short_convolution=4,
        )
    )  # fmt: skip
    if drawn:
        model.draw_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sink_logits"):
            assert torch.equal(parameter, torch.zeros(4)), name
        elif name.endswith("short_convolution.weight"):
            assert torch.equal(parameter, torch.tensor([1.0, 0, 0, 0]).expand(3 * 128, -1)), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


ARMS: dict[str, dict[str, Any]] = {
    **{name: SHAPES[name] for name in ("mhsa", "rope", "alibi", "no-positions", "softcap", "tied")},
    "qk-norm": {"qk_norm": True},
    "sink-logits": {"sink_logits": True},
    "short-convolution": {"short_convolution": 3},
    "all": {"qk_norm": True, "sink_logits": True, "short_convolution": 2, "position_embedding": "rope"},
}


@pytest.mark.parametrize("fields", ARMS.values(), ids=ARMS)
def test_drawn_weights_are_shared_by_all_models_that_have_them(fields: dict[str, Any]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models = [LongShortForCausalLM(make_config(**arm)) for arm in ({}, fields)]
    torch.set_rng_state(before)
    for model in models:
        model.draw_weights(7)
    assert torch.equal(torch.get_rng_state(), before)
    plain, other = (dict(model.named_parameters()) for model in models)
    absent = {"model.embed_positions.weight"} if "position_embedding" in fields else set()
    absent |= {"lm_head.weight"} if "tie_word_embeddings" in fields else set()
    assert plain.keys() - other.keys() == absent
    for name in plain.keys() & other.keys():
        assert torch.equal(plain[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_drawn_weights_do_not_hang_on_what_torch_has_for_default(dtype: torch.dtype) -> None:
    model = LongShortForCausalLM(make_config())
    model.draw_weights(7)
    expected = {name: weight.clone() for name, weight in model.named_parameters()}
    model.draw_weights(8)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model.draw_weights(7)
    finally:
        torch.set_default_dtype(usual)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_drawn_weights_differ_by_seed_and_module() -> None:
    model = LongShortForCausalLM(make_config())
    drawn = []
    for seed in (0, 1, 0):
        model.draw_weights(seed)
        drawn.append({name: weight.clone() for name, weight in model.named_parameters() if weight.ndim == 2})
    assert all(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    firsts = {weight.flatten()[0].item() for weights in drawn[:2] for weight in weights.values()}
    assert len(firsts) == 2 * len(drawn[0])
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        model.draw_weights(-1)


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2, "position_embedding": "rope"}], ids=str)
def test_long_short_and_mhsa_start_from_the_same_bits(fields: dict[str, Any]) -> None:
    states = []
    for num_global_heads in (0, 2, 4):
        torch.manual_seed(7)
        model = LongShortForCausalLM(make_config(num_global_heads=num_global_heads, **fields))
        states.append((model.state_dict(), torch.get_rng_state()))
    for state, rng in states[1:]:
        assert torch.equal(rng, states[0][1])
        assert state.keys() == states[0][0].keys()
        assert all(torch.equal(state[name], states[0][0][name]) for name in state)


@pytest.mark.parametrize("position_embedding", ["learned", "rope", "alibi", "none"])
def test_gradients_are_zero_outside_what_is_seen(position_embedding: str) -> None:
    """Two layers of window 3 reach 2·(3 - 1) tokens back; a global head reaches the first."""
    length = 13
    for num_global_heads, reach in ((0, 4), (1, length)):
        model = make_model(num_global_heads=num_global_heads, position_embedding=position_embedding)
        embeds = torch.randn(1, length, 16, requires_grad=True)
        logits = model(inputs_embeds=embeds).logits
        for query in range(length):
            (grad,) = torch.autograd.grad(logits[0, query].sum(), embeds, retain_graph=True)
            tokens = torch.arange(length)
            assert torch.equal(grad[0].abs().sum(-1) != 0, (tokens <= query) & (tokens >= query - reach))


def test_attention_layers_have_the_configured_options_in_order() -> None:
    model = make_model(
        num_global_heads=[1, 2], attention_precision="bf16-flash", softcap=3.0, position_embedding="rope",
        global_position_embedding="alibi", rope_theta=77.0,
    )  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
    assert [layer.layout for layer in layers] == model.config.head_layouts()
    for layer in layers:
        assert layer.attention_precision == "bf16-flash" and layer.softcap == 3.0
        assert layer.rotary is not None and layer.rotary.base == 77.0
        assert layer.rotary.skip_heads == layer.layout.global_heads
    assert layers[0].alibi_slopes is not None and layers[0].alibi_slopes.tolist() == [0, 0, 0, 2**-8]


def test_precisions_give_different_bits_of_the_same_function() -> None:
    logits = {
        precision: make_model(attention_precision=precision)(make_ids(), use_cache=False).logits
        for precision in ATTENTION_PRECISIONS
    }
    assert torch.equal(logits["input"], logits["fp32"])
    torch.testing.assert_close(logits["fp64"], logits["fp32"], rtol=1e-5, atol=1e-6)
    rounded = ("bf16", "bf16-flash", "sdpa-bf16")
    assert len({logits[precision].sum().item() for precision in rounded}) == len(rounded)
    for precision in rounded:
        assert not torch.equal(logits[precision], logits["fp32"])
        torch.testing.assert_close(logits[precision], logits["fp32"], rtol=0.1, atol=0.1)


PADDED = [[0] * 4 + [1] * 9, [1] * 11 + [0] * 2, [1] * 13]


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("as_generate", [False, True], ids=["mask", "mask-and-positions"])
def test_padded_sequences_give_what_each_gives_alone(fields: dict[str, Any], as_generate: bool) -> None:
    model = make_model(**fields)
    ids = make_ids(batch=3)
    mask = torch.tensor(PADDED)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1) if as_generate else None
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(3):
        tokens = mask[row].bool()
        alone = model(ids[row][tokens][None]).logits[0]
        torch.testing.assert_close(logits[row][tokens], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("told_by", ["position_ids", "segment_ids", "both"])
def test_packed_sequences_give_what_each_gives_alone(fields: dict[str, Any], told_by: str) -> None:
    model = make_model(**fields)
    ids = make_ids()
    lengths = [5, 1, 7]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segment_ids = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed = {"position_ids": positions, "segment_ids": segment_ids}
    if told_by != "both":
        packed = {told_by: packed[told_by]}
    logits = model(ids, **packed).logits
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        # Segment ids alone let positions go on: learned ones then differ from those of the sequence alone.
        alone_at = torch.arange(start, start + length)[None] if told_by == "segment_ids" else None
        alone = model(ids[:, part], position_ids=alone_at).logits
        torch.testing.assert_close(logits[:, part], alone, rtol=1e-4, atol=1e-5)
        start += length


def test_mask_and_segment_ids_together() -> None:
    model = make_model()
    ids = make_ids()
    segment_ids = torch.tensor([[4] * 6 + [9] * 7] * 2)
    mask = torch.tensor([[0] * 2 + [1] * 11, [1] * 10 + [0] * 3])
    logits = model(ids, attention_mask=mask, segment_ids=segment_ids).logits
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(ids, segment_ids=segment_ids.masked_fill(mask == 0, -1), position_ids=positions).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, model(ids, attention_mask=mask).logits)


def test_a_mask_of_ones_changes_nothing() -> None:
    model = make_model()
    ids = make_ids()
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    assert torch.equal(model(ids, position_ids=torch.arange(13)[None]).logits, model(ids).logits)


@pytest.mark.parametrize("kept", [0, 1, 4, 13, torch.tensor([0, 5, 12])], ids=str)
def test_logits_to_keep(kept: int | Tensor) -> None:
    model = make_model()
    whole = model(make_ids()).logits
    expected = whole[:, kept] if isinstance(kept, Tensor) else whole[:, -kept:]
    torch.testing.assert_close(model(make_ids(), logits_to_keep=kept).logits, expected, rtol=1e-5, atol=1e-6)


def test_inputs_embeds_stand_for_ids() -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(make_ids())
    assert torch.equal(model(inputs_embeds=embeds).logits, model(make_ids()).logits)
    assert torch.equal(model(make_ids().int()).logits, model(make_ids()).logits)


def test_hidden_states() -> None:
    model = make_model()
    out = model(make_ids(), output_hidden_states=True)
    assert out.attentions is None
    assert len(out.hidden_states) == 3
    embedded = model.model.embed_tokens(make_ids()) + model.model.embed_positions(torch.arange(13))
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(out.hidden_states[1], model.model.layers[0](embedded, None, None, None))
    decoder_out = model.model(make_ids())
    assert torch.equal(out.hidden_states[2], decoder_out.last_hidden_state)
    assert decoder_out.hidden_states is None and model(make_ids()).hidden_states is None


def test_tuples_instead_of_outputs() -> None:
    model = make_model()
    loss, logits = model(make_ids(), labels=make_ids(), use_cache=False, return_dict=False)
    out = model(make_ids(), labels=make_ids())
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    (last,) = model.model(make_ids(), use_cache=False, return_dict=False)
    assert torch.equal(last, model.model(make_ids()).last_hidden_state)


def test_a_cache_is_kept_in_evaluation_only_unless_asked_for() -> None:
    model = make_model()
    assert model(make_ids()).past_key_values.get_seq_length() == 13
    assert model(make_ids(), use_cache=False).past_key_values is None
    assert make_model(use_cache=False)(make_ids()).past_key_values is None
    model.train()
    assert model(make_ids()).past_key_values is None
    assert model(make_ids(), use_cache=True).past_key_values.get_seq_length() == 13
    assert make_model(short_convolution=2)(make_ids()).past_key_values is None


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_cached_and_uncached_passes_agree(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    ids = make_ids()
    cache = DynamicCache()
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_cached_padded_passes_agree_without_position_ids() -> None:
    model = make_model()
    ids = make_ids(batch=3)
    mask = torch.tensor(PADDED)
    cache = DynamicCache()
    first = model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache).logits
    second = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    whole = model(ids, attention_mask=mask).logits
    tokens = mask.bool()
    torch.testing.assert_close(torch.cat([first, second], 1)[tokens], whole[tokens], rtol=1e-4, atol=1e-5)
