"""The precision "sdpa-bf16": global heads through PyTorch's own flash kernel."""

from typing import Any

import pytest
import torch
from tests.layer_cases import LAYOUT, GrowingCache, make_input, make_layer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longshort.attention import attention
from longshort.flash import FlashAttention
from longshort.layers import LongShortAttention, Observation
from longshort.layout import HeadLayout

LAYOUTS = {
    "grouped": LAYOUT,
    "mhsa": HeadLayout((None,) * 4),
    "mixed-order": HeadLayout((None, 3, None, 5, 3, None)),
    "sinks": HeadLayout((None, None, 2, 2), num_kv_heads=2, sink_tokens=2),
    "local": HeadLayout((3, 5)),
}


def make_qkv(layout: HeadLayout, length: int = 40, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        (2 * torch.randn(2, heads, length, head_dim, generator=generator)).bfloat16().requires_grad_()
        for heads in (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads)
    )  # pyright: ignore[reportReturnType]


class Kernels(TorchDispatchMode):
    """Records the names of the operators of SDPA that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.names.append((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "local"])
def test_each_head_and_its_gradients_are_those_of_its_kernel(name: str) -> None:
    layout = LAYOUTS[name]
    q, k, v = make_qkv(layout)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    out = FlashAttention(layout).attend(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    size = layout.group_size
    by_kv_head = [x.unflatten(1, (-1, size)) for x in (q, out, grad)]
    for kv_head, window in enumerate(layout.windows[::size]):
        its_q, its_out, its_grad = (x[:, kv_head] for x in by_kv_head)
        its_k, its_v = (x[:, kv_head : kv_head + 1] for x in (k, v))
        if window is None:
            expected = F.scaled_dot_product_attention(its_q, its_k, its_v, is_causal=True, enable_gqa=True)
        else:
            alone = HeadLayout((window,) * size, 1, layout.sink_tokens)
            expected = attention(its_q, its_k, its_v, alone)
        assert torch.equal(its_out, expected), kv_head
        wanted = torch.autograd.grad(expected, (q, k, v), its_grad)
        places = slice(kv_head * size, (kv_head + 1) * size), kv_head, kv_head
        for got, other, place in zip(gradients, wanted, places, strict=True):
            assert torch.equal(got[:, place], other[:, place]), kv_head


def test_the_kernel_gets_bf16_and_global_heads_only() -> None:
    with Kernels() as of_bf16:
        make_layer(attention_precision="bf16")(make_input()).sum().backward()
    x = make_input(length=40)
    with Kernels() as kernels, torch.autocast("cpu", torch.bfloat16):
        make_layer(attention_precision="sdpa-bf16")(x).float().square().sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert kernels.names == [(flash, torch.bfloat16), (f"{flash}_backward", torch.bfloat16)]
    assert all(dtype != torch.bfloat16 for _, dtype in of_bf16.names)


def test_it_rounds_as_no_other_precision_does() -> None:
    x = 4 * make_input(length=60)
    layers = {
        name: make_layer(attention_precision=name) for name in ("fp64", "bf16", "bf16-flash", "sdpa-bf16")
    }
    results = {name: layer(x).detach() for name, layer in layers.items()}
    for name in ("bf16", "bf16-flash"):
        assert not torch.equal(results["sdpa-bf16"], results[name])
    errors = {name: (result - results["fp64"]).norm().item() for name, result in results.items()}
    assert 0 < errors["sdpa-bf16"] <= 2 * errors["bf16-flash"]


def test_a_layer_without_global_heads_computes_as_with_bf16() -> None:
    layout, x = LAYOUTS["local"], make_input()
    options: dict[str, Any] = {"softcap": 3.0, "alibi_slopes": [0.1, 0.2], "sink_logits": True}
    segment_ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    got, expected = (
        make_layer(layout, attention_precision=name, **options)(x, segment_ids)
        for name in ("sdpa-bf16", "bf16")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "checkpointed"])
def test_an_observer_gets_all_statistics_and_changes_no_bit(name: str, checkpointed: bool) -> None:
    layout = LAYOUTS[name]
    slopes = [0.0 if window is None else 0.25 for window in layout.windows]
    seen: list[Observation] = []

    def results(observer: Any) -> list[Tensor]:
        layer = make_layer(layout, attention_precision="sdpa-bf16", alibi_slopes=slopes)
        layer.observer = observer
        x = make_input(length=40).requires_grad_()
        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
        return [out, *(p.grad for p in (x, *layer.parameters()) if p.grad is not None)]

    observed, unobserved = results(seen.append), results(None)
    assert len(seen) == (2 if checkpointed else 1) and len(observed) == len(unobserved) == 4
    assert all(map(torch.equal, observed, unobserved))
    one = seen[0]
    _, expected = attention(one.q, one.k, one.v, layout, return_stats=True, **one.options)
    for field in ("lse", "max_logit", "entropy"):
        torch.testing.assert_close(getattr(one.stats, field), getattr(expected, field))
    assert one.stats.lse.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 3.0}, "softcap=3.0 on global heads"),
        ({"alibi_slopes": [0.0] * 5 + [0.5]}, "ALiBi on global heads"),
        ({"sink_logits": True}, "sink_logits=True on global heads"),
    ],
    ids=str,
)
def test_what_the_kernel_lacks_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"attention_precision 'sdpa-bf16' does not go with {message}"):
        LongShortAttention(20, LAYOUT, 8, attention_precision="sdpa-bf16", **options)


def test_segments_are_refused_without_a_cache_only() -> None:
    layer, x = make_layer(attention_precision="sdpa-bf16"), make_input()
    segment_ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    with pytest.raises(ValueError, match=r"segment_ids .* must be None with attention_precision 'sdpa-bf16'"):
        layer(x, segment_ids)
    cached = layer(x, segment_ids, cache=GrowingCache())
    assert torch.equal(cached, make_layer(attention_precision="bf16")(x, segment_ids))


def test_decoding_through_a_cache_goes_as_with_bf16() -> None:
    x = make_input()
    through_cache = []
    for precision in ("sdpa-bf16", "bf16"):
        layer, cache = make_layer(attention_precision=precision), GrowingCache()
        through_cache.append(torch.cat([layer(part, cache=cache) for part in x.split([6, 1, 4], 1)], 1))
    assert torch.equal(*through_cache)
    torch.testing.assert_close(
        through_cache[0], make_layer(attention_precision="sdpa-bf16")(x), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)], ids=str)
def test_small_inputs(shape: tuple[int, int]) -> None:
    layer = make_layer(attention_precision="sdpa-bf16")
    out = layer(make_input(*shape))
    assert out.shape == (*shape, 20)
    out.sum().backward()
    assert layer.qkv_proj.weight.grad is not None


@pytest.mark.parametrize("observed", [False, True], ids=["plain", "observed"])
@pytest.mark.parametrize(
    "name", ["mixed-order", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped", "mhsa"))]
)
def test_compiles_without_graph_breaks(name: str, observed: bool) -> None:
    torch.compiler.reset()
    layer = make_layer(LAYOUTS[name], attention_precision="sdpa-bf16")
    if observed:
        layer.observer = lambda observation: None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (11, 40):
        results = []
        for run in (compiled, layer):
            x = make_input(length=length).requires_grad_()
            out = run(x)
            out.square().sum().backward()
            results.append((out, x.grad))
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
