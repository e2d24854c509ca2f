"""Which pairs a call of each attention implementation shows, and the statistics over them, tile by tile."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.huggingface.watched_decoders import Truth, truth
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from longshort.huggingface import head_statistics
from longshort.huggingface.calls import visibility_of, windows_of
from longshort.huggingface.dispatch import AttentionCall
from longshort.huggingface.head_statistics import HeadStatistics, measure
from longshort.huggingface.state import NAMES
from longshort.huggingface.visibility import HeadWindows, Visibility

HEADS, KV_HEADS = 4, 2


def make_call(
    implementation: str, q_len: int, kv_len: int, mask: Any = None, batch: int = 2, **options: Any
) -> AttentionCall:
    generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)
    q = 3 * torch.randn(batch, HEADS, q_len, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, KV_HEADS, kv_len, 8, generator=generator, dtype=torch.float64)
    module = nn.Module()
    module.is_causal = options.pop("module_is_causal", True)  # type: ignore[assignment]
    module.layer_idx = 1  # type: ignore[assignment]
    module.config = options.pop("config", None)  # type: ignore[assignment]
    return AttentionCall(module, implementation, q, k, mask, options)


def assert_shows(call: AttentionCall, visible: Tensor, bias: Tensor | None = None) -> None:
    """Compare with the truth over pairs that are marked one by one: (batch or 1, heads or 1, queries,
    keys)."""
    found = measure(call.q, call.k, visibility_of(call), 0.3, None)
    assert_close(found, truth(call.q, call.k, visible, 0.3, bias=bias))


def assert_close(found: HeadStatistics, wanted: Truth) -> None:
    assert found.max_logit.tolist() == pytest.approx(wanted.max_logit, rel=1e-12)
    assert found.entropy.tolist() == pytest.approx(wanted.entropy, rel=1e-9, abs=1e-12)
    assert found.row_range.tolist() == pytest.approx(wanted.row_range, rel=1e-12)


def distances(q_len: int, kv_len: int, past: int | None = None) -> Tensor:
    past = kv_len - q_len if past is None else past
    return (past + torch.arange(q_len))[:, None] - torch.arange(kv_len)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_eager_and_flex_without_a_mask_show_everything(implementation: str) -> None:
    assert_shows(make_call(implementation, 6, 9), torch.ones(6, 9, dtype=torch.bool))


def test_sdpa_without_a_mask_counts_from_the_first_key() -> None:
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert_shows(make_call("sdpa", 6, 6), everything.tril())
    assert_shows(make_call("sdpa", 4, 9), distances(4, 9, past=0) >= 0)
    assert_shows(make_call("sdpa", 1, 9), torch.ones(1, 9, dtype=torch.bool))
    assert_shows(make_call("sdpa", 6, 6, module_is_causal=False), everything)
    assert_shows(make_call("sdpa", 6, 6, is_causal=False), everything)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2", "mine"])
def test_a_4d_mask_is_all_that_counts(implementation: str) -> None:
    visible = torch.rand(2, HEADS, 6, 9) < 0.5
    visible[0, :, 2] = False  # a row that sees nothing
    options = {"sliding_window": 2, "module_is_causal": True}
    assert_shows(make_call(implementation, 6, 9, visible, **options), visible)
    for dtype, lowest in ((torch.float32, -math.inf), (torch.bfloat16, torch.finfo(torch.bfloat16).min)):
        bias = torch.zeros(2, HEADS, 6, 12, dtype=dtype)  # a mask may be longer than the keys
        bias[..., :9].masked_fill_(~visible, lowest)
        assert_shows(make_call(implementation, 6, 9, bias, **options), visible)
    assert_shows(make_call(implementation, 6, 9, visible[:1, :1]), visible[:1, :1])


def test_a_bias_counts_in_the_entropy_alone() -> None:
    bias = torch.randn(2, HEADS, 6, 9, dtype=torch.float64)
    assert_shows(make_call("eager", 6, 9, bias), torch.ones(6, 9, dtype=torch.bool), bias)
    both = make_call("sdpa", 6, 6, position_bias=bias[..., :6])
    assert_shows(both, torch.ones(6, 6, dtype=torch.bool).tril(), bias[..., :6])


def test_a_block_mask_shows_what_its_rule_says() -> None:
    ends = torch.tensor([7, 3])
    widths = torch.tensor([1, 2, 30, 4])

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < widths[h]) & (k < ends[b])

    mask = create_block_mask(rule, 2, HEADS, 9, 9, device="cpu")
    span = distances(9, 9)
    visible = (span >= 0) & (span < widths[:, None, None]) & (torch.arange(9) < ends[:, None, None, None])
    assert_shows(make_call("flex_attention", 9, 9, mask), visible)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn", "mine"])
def test_flash_attention_masks_padding_windows_and_packed_sequences(implementation: str) -> None:
    span = distances(6, 9)
    assert_shows(make_call(implementation, 6, 9), span >= 0)
    assert_shows(make_call(implementation, 6, 9, sliding_window=3), (span >= 0) & (span < 3))
    assert_shows(make_call(implementation, 6, 9, is_causal=False), torch.ones(6, 9, dtype=torch.bool))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :5], mask[1, 7:] = 0, 0
    seen = mask[:, None, None, :].bool() & mask[:, None, 3:, None].bool()
    assert_shows(make_call(implementation, 6, 9, mask), (span >= 0) & seen)

    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    packed = (distances(9, 9) >= 0) & (ids[:, None] == ids)
    bounds = torch.tensor([0, 3, 5, 9], dtype=torch.int32)
    options: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    assert_shows(make_call(implementation, 9, 9, batch=1, **options), packed)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    assert_shows(make_call(implementation, 9, 9, batch=1, position_ids=positions), packed)
    one = torch.arange(4, 13)[None]
    assert_shows(make_call(implementation, 9, 9, batch=1, position_ids=one), distances(9, 9) >= 0)
    many = make_call(implementation, 9, 9, position_ids=positions)  # only a batch of 1 is packed by positions
    assert_shows(many, distances(9, 9) >= 0)


def test_longshort_layers_have_a_window_for_each_head() -> None:
    layout = {"windows": [2, 2, None, None], "num_kv_heads": 2, "sink_tokens": 1}
    config = SimpleNamespace(longshort={"layouts": [None, layout]})
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 3, 3, 3, 3, 3]])
    begin = torch.tensor([2, 0]), torch.tensor([2, 4])
    span = distances(9, 9)
    is_sink = torch.zeros(2, 9, dtype=torch.bool)
    for places in begin:
        is_sink[torch.arange(2), places] = True
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    near = torch.stack([(span < 2) | sinks for sinks in is_sink])
    visible = torch.stack([near, near, torch.ones_like(near), torch.ones_like(near)], 1)
    visible = visible & (span >= 0) & same[:, None]
    call = make_call("longshort", 9, 9, ids[:, None, None], config=config)
    assert_shows(call, visible)
    assert windows_of(call) == (2, 2, None, None)

    call = make_call("longshort", 9, 9, config=config, sliding_window=4)  # without sinks
    widths = torch.tensor([2, 2, 4, 4])[:, None, None]
    assert_shows(call, (span >= 0) & (span < widths))
    assert windows_of(call) == (2, 2, 4, 4)

    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for options in ({"cu_seq_lens_q": bounds}, {"position_ids": positions}):
        for name in NAMES:
            call = make_call(name, 9, 9, batch=1, config=config, **options)
            assert_shows(call, visible[1:])
        padded = torch.tensor([0, 0, 0, 0, 0, 0, 0, -1, -1])[None, None, None]
        call = make_call("longshort", 9, 9, padded, batch=1, config=config, **options)
        is_token = padded[0] == 0
        assert_shows(call, visible[1:] & is_token & is_token.mT)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(2, 5), {}, r"attention_mask of layer 1 \(Module\) must be .* got \(2, 5\)"),
        ("mask", {}, "got str"),
        (None, {"cache": object()}, "must not use a paged cache"),
        (
            None,
            {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 9])},
            "cu_seq_lens_q of layer 1 .* must equal cu_seq_lens_k",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(mask: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visibility_of(make_call("flash_attention_2", 6, 9, mask, **options))


@settings(max_examples=60)
@given(st.data())
def test_tiles_together_give_the_numbers_of_all_pairs(data: st.DataObject) -> None:
    kv_len = data.draw(st.integers(1, 40), "kv_len")
    q_len = data.draw(st.sampled_from([kv_len, 1, (kv_len + 1) // 2]), "q_len")
    batch, group = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 3), "group")
    windows = data.draw(st.lists(st.sampled_from([None, 1, 3, 7, 50]), min_size=1, max_size=3), "windows")
    by_window: dict[int | None, list[int]] = {}
    for kv_head, window in enumerate(windows):
        by_window.setdefault(window, []).extend(range(kv_head * group, (kv_head + 1) * group))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    size = data.draw(st.sampled_from([1.0, 30.0, 1000.0]), "size")
    heads = group * len(windows)
    q = size * torch.randn(batch, heads, q_len, 4, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, len(windows), kv_len, 4, generator=generator, dtype=torch.float64)
    ids = None
    if data.draw(st.booleans(), "segments"):
        ids = torch.randint(-1, 3, (batch, kv_len), generator=generator)
    mask = None
    if data.draw(st.booleans(), "mask"):
        mask = torch.rand(batch, 1, q_len, kv_len, generator=generator) < 0.7
    causal, sinks = data.draw(st.booleans(), "causal"), data.draw(st.integers(0, 2), "sinks")
    softcap = data.draw(st.sampled_from([None, 5.0]), "softcap")
    slopes = torch.rand(heads, generator=generator).double() if data.draw(st.booleans(), "alibi") else None
    visibility = Visibility(
        q_len, kv_len, q.device, tuple(HeadWindows(tuple(of), window) for window, of in by_window.items()),
        causal=causal, past=kv_len - q_len, sink_tokens=sinks, segment_ids=ids,
        masks=() if mask is None else (mask,), slopes=slopes,
    )  # fmt: skip

    span = distances(q_len, kv_len)
    visible = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
    for head in range(heads):
        window = windows[head // group]
        for entry in range(batch):
            for key in range(kv_len):
                earlier = [] if ids is None else [j for j in range(key) if ids[entry, j] == ids[entry, key]]
                place = key if ids is None else len(earlier)
                if window is not None and place >= sinks:
                    visible[entry, head, :, key] &= span[:, key] < window
    if causal:
        visible &= span >= 0
    if ids is not None:
        own = ids[:, kv_len - q_len :]
        visible &= ((own[:, :, None] == ids[:, None]) & (own[:, :, None] >= 0))[:, None]
    if mask is not None:
        visible &= mask
    bias = None if slopes is None else -slopes[:, None, None] * span.abs()
    with pytest.MonkeyPatch.context() as patch:  # many small tiles
        patch.setattr(head_statistics, "_MOST_KEYS", data.draw(st.sampled_from([4, 16]), "tile"))
        patch.setattr(head_statistics, "_TILE_SCORES", {"cpu": 16 * heads * 16})
        found = measure(q, k, visibility, 0.5, softcap)
    assert_close(found, truth(q, k, visible, 0.5, softcap, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_lose_no_entropy(dtype: torch.dtype) -> None:
    q = (300 * torch.randn(1, 2, 200, 16)).to(dtype)
    k = torch.randn(1, 2, 200, 16).to(dtype)
    everything = (HeadWindows((0, 1), None),)
    found = measure(q, k, Visibility(200, 200, q.device, everything, causal=True), 0.25, None)
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    exact = truth(q.double(), k.double(), causal, 0.25)
    plain = truth(q.float(), k.float(), causal, 0.25)
    for name in ("max_logit", "entropy", "row_range"):
        wanted, rounded = (torch.tensor(getattr(x, name), dtype=torch.float64) for x in (exact, plain))
        slack = 2 * torch.finfo(torch.float32).eps * wanted.abs().max()
        error = (getattr(found, name).double() - wanted).abs().max()
        assert error <= 2 * (rounded - wanted).abs().max() + slack, name


def test_nan_is_told_where_it_is_seen_and_nowhere_else() -> None:
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    k[0, 1, 5] = math.nan
    visibility = Visibility(6, 6, q.device, (HeadWindows((0, 1), None),), causal=True)
    found = measure(q, k, visibility, 1.0, None)
    for values in (found.max_logit, found.entropy, found.row_range):
        assert not values[0].isnan() and values[1].isnan()
    hidden = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    hidden[..., 5] = False
    masked = measure(q, k, Visibility(6, 6, q.device, visibility.groups, masks=(hidden,)), 1.0, None)
    assert not any(x.isnan().any() for x in (masked.max_logit, masked.entropy, masked.row_range))


def test_heads_must_fit() -> None:
    visibility = Visibility(2, 2, torch.device("cpu"), (HeadWindows((0, 1, 2), None),))
    with pytest.raises(ValueError, match="query heads must be a multiple of the 2 KV heads, got 3"):
        measure(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4), visibility, 1.0, None)


def test_memory_is_linear_in_the_length() -> None:
    """No tensor of a long sequence has more numbers than its tiles."""
    largest = 0

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    length = 4096
    q, k = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)
    visibility = Visibility(length, length, q.device, (HeadWindows((0, 1), None),), causal=True)
    with Sizes():
        measure(q, k, visibility, 1.0, None)
    assert largest <= 2**19 < length**2
