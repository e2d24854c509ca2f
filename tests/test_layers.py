"""`LongShortAttention`: what it computes, precision, caching and observing."""

import math
from typing import Any

import pytest
import torch
from tests.layer_cases import LAYOUT, GrowingCache, SilentCache, make_input, make_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longshort.attention import attention
from longshort.layers import LongShortAttention, Observation, Rotary
from longshort.layout import HeadLayout


def llama_rotation(q: Tensor, k: Tensor, position_ids: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """As Hugging Face's Llama has it, with angles in float64."""
    dim = q.shape[-1]
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2).double() / dim))
    angles = position_ids[..., None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return apply_rotary_pos_emb(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))


def naive_forward(layer: LongShortAttention, x: Tensor, slopes: list[float] | None = None) -> Tensor:
    """The layer in plain maths, head by head, from its weights."""
    layout, dim = layer.layout, layer.head_dim
    heads, group = layout.num_heads, layout.group_size
    length = x.shape[1]
    projected = x @ layer.qkv_proj.weight.to(x.dtype).T
    if layer.short_convolution is not None:
        projected = naive_convolution(projected, layer.short_convolution.weight)
    per_head = [projected[..., i * dim : (i + 1) * dim] for i in range(heads + 2 * layout.num_kv_heads)]
    outputs = []
    for head, window in enumerate(layout.windows):
        q = per_head[head]
        k = per_head[heads + head // group]
        v = per_head[heads + layout.num_kv_heads + head // group]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = naive_norm(q, layer.q_norm.weight), naive_norm(k, layer.k_norm.weight)
        if layer.rotary is not None and head not in layer.rotary.skip_heads:
            positions = torch.arange(length)[None]
            q, k = (r[:, 0] for r in llama_rotation(q[:, None], k[:, None], positions, layer.rotary.base))
        scores = q @ k.mT / math.sqrt(dim)
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        if slopes is not None:
            scores = scores - slopes[head] * distance.abs()
        hidden = (distance < 0) | (distance >= (window or length))
        scores = scores.masked_fill(hidden, -math.inf)
        if layer.sink_logits is not None:
            scores = torch.cat([scores, layer.sink_logits[head].expand(*scores.shape[:-1], 1)], -1)
        outputs.append(scores.softmax(-1)[..., :length] @ v)
    return torch.cat(outputs, -1) @ layer.o_proj.weight.to(x.dtype).T


def naive_convolution(x: Tensor, weight: Tensor) -> Tensor:
    taps = range(weight.shape[1])
    tokens = [
        sum(weight[:, back] * x[:, token - back] for back in taps if back <= token)
        for token in range(x.shape[1])
    ]
    return torch.stack(tokens, 1)  # pyright: ignore[reportArgumentType]


def naive_norm(x: Tensor, gain: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.to(x.dtype)


def attention_input_and_output(
    layer: LongShortAttention, x: Tensor, **call: Any
) -> tuple[Observation, Tensor]:
    """What attention got in a forward pass, and what o_proj got."""
    seen: list[Observation] = []
    projected: list[Tensor] = []
    handle = layer.o_proj.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0]))
    layer.observer = seen.append
    layer(x, **call)
    layer.observer = None
    handle.remove()
    return seen[0], projected[0]


def merged_heads(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param(LAYOUT, {}, id="grouped"),
        pytest.param(HeadLayout.split(4, 1, 3), {"head_dim": 6}, id="local-first"),
        pytest.param(HeadLayout.split(4, 4, 1), {"head_dim": None}, id="all-global"),
        pytest.param(HeadLayout((None, 2, 3)), {"head_dim": 5}, id="own-order"),
        pytest.param(LAYOUT, {"qk_norm": True}, id="qk-norm"),
        pytest.param(LAYOUT, {"rotary": Rotary()}, id="rotary"),
        pytest.param(LAYOUT, {"rotary": Rotary(100.0, (2, 3)), "qk_norm": True}, id="rotary-skips-inner"),
        pytest.param(LAYOUT, {"rotary": Rotary(500.0, (5, 4))}, id="rotary-skips-global"),
        pytest.param(LAYOUT, {"rotary": Rotary(skip_heads=tuple(range(6)))}, id="rotary-skips-all"),
        pytest.param(LAYOUT, {"softcap": 0.5}, id="softcap"),
        pytest.param(LAYOUT, {"alibi_slopes": (0.5, 0.25, 0.0, 0.125, 1.0, 0.0)}, id="alibi"),
        pytest.param(LAYOUT, {"sink_logits": True}, id="sink-logits"),
        pytest.param(LAYOUT, {"short_convolution": 3}, id="short-convolution"),
        pytest.param(
            LAYOUT, {"short_convolution": 20, "qk_norm": True, "rotary": Rotary()}, id="long-convolution"
        ),
    ],
)
def test_forward_and_gradients_equal_plain_maths(layout: HeadLayout, options: dict[str, Any]) -> None:
    layer = make_layer(layout, **options).double()
    x = make_input().double().requires_grad_()
    out = layer(x)
    expected = naive_forward(layer, x, options.get("alibi_slopes"))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad(out.square().sum(), wanted)
    expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-9)


def test_fused_projection_holds_queries_then_keys_then_values() -> None:
    layer = make_layer()
    assert layer.qkv_proj.weight.shape == ((6 + 3 + 3) * 8, 20)
    assert layer.o_proj.weight.shape == (20, 6 * 8)
    assert layer.qkv_proj.bias is None and layer.o_proj.bias is None
    observation, _ = attention_input_and_output(layer, make_input())
    q, k, v = layer.qkv_proj(make_input()).unflatten(-1, (12, 8)).transpose(1, 2).split([6, 3, 3], 1)
    torch.testing.assert_close((observation.q, observation.k, observation.v), (q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_llamas_with_exact_angles(dtype: torch.dtype) -> None:
    """Positions up to 131,071, where angles in fp32 are off by 0.008."""
    layer = make_layer(rotary=Rotary(base=500_000.0)).to(dtype)
    plain = make_layer().to(dtype)
    position_ids = torch.randint(0, 131_072, (2, 11), generator=torch.Generator().manual_seed(3))
    position_ids[0, 0] = 131_071
    rotated, _ = attention_input_and_output(layer, make_input().to(dtype), position_ids=position_ids)
    straight, _ = attention_input_and_output(plain, make_input().to(dtype))
    q, k = llama_rotation(straight.q.double(), straight.k.double(), position_ids, 500_000.0)
    size = max(q.abs().max().item(), k.abs().max().item())
    tolerance = size * (3e-7 if dtype == torch.float32 else 1e-13)
    torch.testing.assert_close(rotated.q.double(), q, rtol=0, atol=tolerance)
    torch.testing.assert_close(rotated.k.double(), k, rtol=0, atol=tolerance)
    assert rotated.q.dtype == dtype and torch.equal(rotated.v, straight.v)


def test_rotation_is_relative() -> None:
    layer = make_layer(rotary=Rotary()).double()
    x = make_input().double()
    for shift in (7, 131_000):
        shifted = layer(x, position_ids=torch.arange(shift, shift + 11)[None])
        torch.testing.assert_close(shifted, layer(x), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(layer(x, position_ids=2 * torch.arange(11)[None]), layer(x), atol=1e-3)


def test_skipped_heads_are_not_touched_by_the_rotation() -> None:
    layer = make_layer(rotary=Rotary(skip_heads=(0, 1)))
    rotated, _ = attention_input_and_output(layer, make_input())
    straight, _ = attention_input_and_output(make_layer(), make_input())
    assert torch.equal(rotated.q[:, :2], straight.q[:, :2])
    assert torch.equal(rotated.k[:, :1], straight.k[:, :1])
    assert not torch.equal(rotated.q[:, 2:], straight.q[:, 2:])
    assert not torch.equal(rotated.k[:, 1:], straight.k[:, 1:])


def test_a_head_has_no_gradient_beyond_what_it_sees() -> None:
    layer = make_layer()
    length = 11
    x = make_input(batch=1)
    values: list[Tensor] = []
    per_head: list[Tensor] = []

    def keep_value_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        values.append(output)
        return output

    layer.qkv_proj.register_forward_hook(keep_value_gradient)
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: per_head.append(inputs[0]))
    layer(x)
    out = per_head[0].unflatten(-1, (6, 8))
    for head, window in enumerate(LAYOUT.windows):
        for query in range(length):
            (grad,) = torch.autograd.grad(out[0, query, head].sum(), values[0], retain_graph=True)
            value_grad = grad[0].unflatten(-1, (12, 8))[:, 9 + head // 2].abs().sum(-1)
            seen = torch.arange(length) <= query
            if window is not None:
                seen &= torch.arange(length) > query - window
            assert torch.equal(value_grad != 0, seen), (head, query)


@pytest.mark.parametrize("rotary", [None, Rotary(skip_heads=(4, 5))])
@pytest.mark.parametrize("precision", ["input", "fp64", "fp32", "bf16"])
def test_decoding_with_a_cache_equals_one_pass(rotary: Rotary | None, precision: str) -> None:
    layer = make_layer(rotary=rotary, qk_norm=True, attention_precision=precision)
    x = make_input()
    cache = GrowingCache()
    pieces = [layer(part, cache=cache) for part in x.split([4, 1, 1, 3, 2], dim=1)]
    # bf16 rounds sums that blocks of other sizes order otherwise.
    tolerance = 1e-2 if precision == "bf16" else 1e-5
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), rtol=tolerance, atol=tolerance)
    assert cache.length == 11


def test_a_cache_without_length_needs_position_ids_for_rotary_positions_only() -> None:
    x = make_input()
    layer, plain = make_layer(rotary=Rotary()), make_layer()
    cache = SilentCache()
    with pytest.raises(ValueError, match="position_ids are needed"):
        layer(x, cache=cache)
    layer(x[:, :6], position_ids=torch.arange(6)[None], cache=cache)
    last = layer(x[:, 6:], position_ids=torch.arange(6, 11)[None], cache=cache)
    torch.testing.assert_close(last, layer(x)[:, 6:], rtol=1e-5, atol=1e-5)
    cache = SilentCache()
    plain(x[:, :6], cache=cache)
    torch.testing.assert_close(plain(x[:, 6:], cache=cache), plain(x)[:, 6:], rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    layer = make_layer(rotary=Rotary())
    x = make_input()
    segment_ids = torch.tensor([[5] * 4 + [2] * 7, [0] * 4 + [-1] + [1] * 6])
    out = layer(x, segment_ids=segment_ids)
    torch.testing.assert_close(out[:, :4], layer(x[:, :4]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:1, 4:], layer(x[:1, 4:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1:, 5:], layer(x[1:, 5:]), rtol=1e-5, atol=1e-6)
    assert torch.equal(out[1, 4], torch.zeros(20))
    cache = GrowingCache()
    layer(x[:, :8], segment_ids=segment_ids[:, :8], cache=cache)
    last = layer(x[:, 8:], segment_ids=segment_ids, cache=cache)
    torch.testing.assert_close(last, out[:, 8:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("precision", "dtype", "rounds"),
    [
        ("fp64", torch.float64, False),
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("bf16-flash", torch.bfloat16, True),
    ],
)
def test_attention_precision_decides_whatever_autocast_says(
    precision: str, dtype: torch.dtype, rounds: bool, autocast: bool
) -> None:
    layer = make_layer(attention_precision=precision, qk_norm=True, rotary=Rotary())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        observation, projected = attention_input_and_output(layer, make_input())
    q, k, v = observation.q, observation.k, observation.v
    assert q.dtype == k.dtype == v.dtype == dtype
    assert observation.options["round_probabilities"] is rounds
    without_autocast = attention(q, k, v, LAYOUT, round_probabilities=rounds)
    outside = torch.bfloat16 if autocast else torch.float32
    assert torch.equal(projected, merged_heads(without_autocast).to(outside))


def test_input_precision_follows_autocast() -> None:
    layer = make_layer(qk_norm=True, rotary=Rotary())
    observation, _ = attention_input_and_output(layer, make_input())
    assert observation.q.dtype == observation.k.dtype == observation.v.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        observation, projected = attention_input_and_output(layer, make_input())
    assert observation.q.dtype == observation.k.dtype == observation.v.dtype == torch.bfloat16
    assert projected.dtype == torch.bfloat16


def test_bf16_and_bf16_flash_differ_by_the_rounding_of_probabilities() -> None:
    x = 4 * make_input(length=40)
    exact = make_layer(attention_precision="fp32")(x)
    kept = make_layer(attention_precision="bf16")(x)
    rounded = make_layer(attention_precision="bf16-flash")(x)
    assert kept.dtype == rounded.dtype == torch.float32
    assert not torch.equal(kept, rounded)
    for out in (kept, rounded):
        assert not torch.equal(out, exact)
        torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)


def test_fp32_attention_in_a_bf16_module() -> None:
    layer = make_layer(attention_precision="fp32", rotary=Rotary(), dtype=torch.bfloat16)
    observation, projected = attention_input_and_output(layer, make_input().bfloat16())
    assert observation.q.dtype == torch.float32
    assert projected.dtype == torch.bfloat16
    # Rotated in fp32: rounding the rotated queries to bf16 would lose bits.
    assert not torch.equal(observation.q, observation.q.bfloat16().float())


@pytest.mark.parametrize("precision", ["input", "bf16-flash"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "checkpointed"])
def test_an_observer_changes_no_bit(precision: str, checkpointed: bool) -> None:
    def results(observer: Any) -> list[Tensor]:
        layer = make_layer(
            attention_precision=precision, qk_norm=True, rotary=Rotary(), softcap=3.0,
            alibi_slopes=[0.1] * 6,
        )  # fmt: skip
        layer.observer = observer
        x = make_input().requires_grad_()
        segment_ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
        if checkpointed:
            out = checkpoint(layer, x, segment_ids, use_reentrant=False)
        else:
            out = layer(x, segment_ids)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
        grads = [parameter.grad for parameter in layer.parameters()]
        return [out, *(grad for grad in (x.grad, *grads) if grad is not None)]

    seen: list[Observation] = []
    observed, unobserved = results(seen.append), results(None)
    assert len(seen) == (2 if checkpointed else 1)
    assert len(observed) == len(unobserved) == 6
    for with_observer, without in zip(observed, unobserved, strict=True):
        assert torch.equal(with_observer, without)


def test_an_observation_repeats_the_call() -> None:
    layer = make_layer(softcap=2.0, alibi_slopes=[0.0, 0.5] * 3, attention_precision="bf16-flash")
    segment_ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    observation, projected = attention_input_and_output(layer, make_input(), segment_ids=segment_ids)
    out, stats = attention(
        observation.q, observation.k, observation.v, LAYOUT, return_stats=True, **observation.options
    )
    assert torch.equal(merged_heads(out).float(), projected)
    assert torch.equal(stats.max_logit, observation.stats.max_logit)
    assert torch.equal(stats.entropy, observation.stats.entropy)
    assert torch.equal(stats.lse, observation.stats.lse)
    assert observation.options["segment_ids"] is segment_ids


@pytest.mark.parametrize("precision", ["input", "fp64", "fp32", "bf16"])
def test_compiles_without_graph_breaks(precision: str) -> None:
    torch.compiler.reset()
    layer = make_layer(
        qk_norm=True, rotary=Rotary(skip_heads=(4, 5)), attention_precision=precision, alibi_slopes=[0.1] * 6
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = make_input()
    segment_ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tolerance = 2e-2 if autocast or precision == "bf16" else 1e-5
            torch.testing.assert_close(
                compiled(x, segment_ids), layer(x, segment_ids), rtol=tolerance, atol=tolerance
            )


def test_compiles_with_an_observer() -> None:
    torch.compiler.reset()
    layer = make_layer()
    largest: list[Tensor] = []
    layer.observer = lambda observation: largest.append(observation.stats.max_logit.detach())
    x = make_input()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    layer(x)
    assert len(largest) == 2
    torch.testing.assert_close(largest[0], largest[1])


def test_alibi_slopes_stay_exact_in_any_module() -> None:
    slopes = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    layer = make_layer(alibi_slopes=slopes)
    assert "alibi_slopes" not in layer.state_dict()
    exact = torch.tensor(slopes)
    assert layer.alibi_slopes is not None and torch.equal(layer.alibi_slopes, exact)
    layer.to(torch.bfloat16)
    assert layer.o_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.alibi_slopes, exact)
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.alibi_slopes, exact)
    layer.alibi_slopes.zero_()
    layer.reset_buffers()
    assert torch.equal(layer.alibi_slopes, exact)


def test_parameters_are_made_on_the_device_and_in_the_dtype_asked_for() -> None:
    layer = make_layer(device="meta", dtype=torch.bfloat16, qk_norm=True, alibi_slopes=[0.1] * 6)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert sorted(name for name, _ in layer.named_parameters()) == [
        "k_norm.weight", "o_proj.weight", "q_norm.weight", "qkv_proj.weight",
    ]  # fmt: skip


def test_sinks_and_convolution_start_without_random_numbers() -> None:
    torch.manual_seed(0)
    plain = LongShortAttention(20, LAYOUT, 8)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    convolved = LongShortAttention(20, LAYOUT, 8, short_convolution=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(convolved(make_input()), plain(make_input()))
    layer = LongShortAttention(20, LAYOUT, 8, sink_logits=True, dtype=torch.bfloat16)
    assert layer.sink_logits is not None
    assert layer.sink_logits.tolist() == [0.0] * 6 and layer.sink_logits.dtype == torch.bfloat16


def test_a_sink_takes_attention_and_learns() -> None:
    layer, plain = make_layer(sink_logits=True), make_layer()
    with torch.no_grad():
        layer.load_state_dict(plain.state_dict() | {"sink_logits": torch.full((6,), -60.0)})
    torch.testing.assert_close(layer(make_input()), plain(make_input()))
    with torch.no_grad():
        layer.get_parameter("sink_logits").fill_(60.0)
    assert layer(make_input()).abs().max() < 1e-6
    seen: list[Observation] = []
    layer.observer = seen.append
    layer(make_input())
    assert seen[0].options["sink_logits"] is layer.sink_logits


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)], ids=str)
def test_small_inputs(shape: tuple[int, int]) -> None:
    layer = make_layer(rotary=Rotary(), qk_norm=True, sink_logits=True, short_convolution=3)
    assert layer(make_input(*shape)).shape == (*shape, 20)


def test_a_named_backend_is_used() -> None:
    x = make_input()
    reference = make_layer(backend="reference")(x)
    torch.testing.assert_close(make_layer(backend="blockwise")(x), reference, rtol=1e-5, atol=1e-6)


def test_repr_shows_the_layout_and_what_is_special() -> None:
    text = repr(
        make_layer(
            rotary=Rotary(), attention_precision="bf16", softcap=5.0, sink_logits=True, short_convolution=3
        )
    )
    assert repr(LAYOUT) in text
    assert "Rotary" in text and "bf16" in text and "softcap=5.0" in text
    assert "sink_logits=True" in text and "kernel_size=3" in text
