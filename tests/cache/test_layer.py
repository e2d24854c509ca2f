"""`LayerCache` against attention over the whole sequence, recomputed at every step."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import HeadLayout, attention
from longshort.cache import LayerCache

HEAD_DIM = 8


@dataclass
class History:
    """A cache, and all that was ever appended to it and not taken back."""

    cache: LayerCache
    keys: torch.Tensor
    values: torch.Tensor
    segment_ids: torch.Tensor | None
    options: dict = field(default_factory=dict)

    def append(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor | None) -> None:
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        if ids is not None:
            assert self.segment_ids is not None
            self.segment_ids = torch.cat([self.segment_ids, ids], 1)
        options = {**self.options, "segment_ids": self.segment_ids}
        got = self.cache.attend(q, k, v, **options)
        expected = attention(q, self.keys, self.values, self.cache.layout, backend="reference", **options)
        tolerance = 1e-12 if q.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert self.cache.length == self.keys.shape[2]

    def crop(self, count: int) -> None:
        length = self.keys.shape[2] - count
        self.cache.crop(length)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        if self.segment_ids is not None:
            self.segment_ids = self.segment_ids[:, :length]

    def reorder(self, index: torch.Tensor) -> None:
        self.cache.reorder(index)
        self.keys, self.values = self.keys[index], self.values[index]
        if self.segment_ids is not None:
            self.segment_ids = self.segment_ids[index]


@st.composite
def layouts(draw) -> HeadLayout:
    group_size = draw(st.sampled_from([1, 2]))
    windows = draw(st.lists(st.one_of(st.none(), st.integers(1, 7)), min_size=1, max_size=4))
    per_head = tuple(window for window in windows for _ in range(group_size))
    return HeadLayout(per_head, len(windows), draw(st.integers(0, 3)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_schedules_equal_attention_over_everything(data) -> None:
    layout = data.draw(layouts(), "layout")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    rollback = data.draw(st.integers(0, 3), "rollback")
    padding = data.draw(st.sampled_from(["none", "left", "right", "holes"]), "padding")
    max_length = data.draw(st.sampled_from([None, 64]), "max_length")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30), "seed"))
    batch = data.draw(st.integers(1, 3), "batch")
    options: dict = {}
    if data.draw(st.booleans(), "alibi"):
        options["alibi_slopes"] = torch.rand(layout.num_heads, generator=generator)
    if data.draw(st.booleans(), "sink logits"):
        options["sink_logits"] = torch.randn(layout.num_heads, generator=generator)
    if data.draw(st.booleans(), "softcap"):
        options["softcap"] = 2.0

    def new(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, HEAD_DIM, generator=generator, dtype=dtype)

    empty = new(layout.num_kv_heads, 0)
    ids = None if padding == "none" else torch.zeros(batch, 0, dtype=torch.int64)
    history = History(LayerCache(layout, rollback, max_length), empty, empty, ids, options)
    can_take_back = 0
    for _ in range(data.draw(st.integers(2, 7), "steps")):
        action = data.draw(st.sampled_from(["one", "one", "some", "many", "crop", "reorder"]), "action")
        if action == "crop":
            history.crop(data.draw(st.integers(0, can_take_back), "count"))
            can_take_back = 0
            continue
        if action == "reorder":
            if history.cache.length:
                history.reorder(torch.randint(batch, (batch,), generator=generator))
            continue
        length = 1 if action == "one" else data.draw(st.integers(1, 4 if action == "some" else 12), "length")
        if history.cache.length + length > 64:
            break
        segment_ids = None
        if history.segment_ids is not None:
            segment_ids = torch.zeros(batch, length, dtype=torch.int64)
            hidden = torch.randint(0, length + 1, (batch,), generator=generator)
            for row in range(batch):
                if padding == "left" and history.cache.length == 0:
                    segment_ids[row, : hidden[row]] = -1
                elif padding == "right" and history.cache.length == 0 and hidden[row]:
                    segment_ids[row, -hidden[row] :] = -1
                elif padding == "holes":
                    segment_ids[row] = torch.randint(-1, 1, (length,), generator=generator)
        history.append(
            new(layout.num_heads, length), new(layout.num_kv_heads, length), new(layout.num_kv_heads, length),
            segment_ids,
        )  # fmt: skip
        can_take_back = min(rollback, can_take_back + length)


LAYOUT = HeadLayout((4, 4, None, None), num_kv_heads=2, sink_tokens=2)


def tokens(length: int, batch: int = 1, layout: HeadLayout = LAYOUT, **options) -> Any:
    heads = (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads)
    return tuple(torch.randn(batch, count, length, HEAD_DIM, **options) for count in heads)


@pytest.mark.parametrize("steps", [[1] * 40, [30, 1, 1, 1], [3, 3, 3, 20, 1]], ids=str)
def test_bytes_are_those_of_the_layout(steps: list[int]) -> None:
    cache = LayerCache(LAYOUT)
    assert cache.nbytes_used == cache.nbytes_allocated == cache.length == 0
    for step in steps:
        cache.attend(*tokens(step, batch=3))
        assert cache.nbytes_used == 3 * LAYOUT.kv_bytes(cache.length, HEAD_DIM, torch.float32)
        assert cache.nbytes_used <= cache.nbytes_allocated <= 1.5 * cache.nbytes_used


def test_a_growing_store_copies_seldom() -> None:
    cache = LayerCache(HeadLayout((None,)))
    versions = set()
    for _ in range(1000):
        cache.attend(*tokens(1, layout=cache.layout))
        versions.add(cache.stores[0].version)
    assert len(versions) < 40  # log(1000) / log(1.25), and the first ones


def test_a_cache_that_expects_a_prompt_makes_room_once() -> None:
    cache = LayerCache(LAYOUT)
    cache.expect(100)
    cache.attend(*tokens(10))
    data = cache.stores[1].data
    cache.attend(*tokens(90))
    assert cache.stores[1].data is data


def test_a_fixed_size_is_taken_at_once_and_ends() -> None:
    cache = LayerCache(LAYOUT, max_length=20)
    cache.attend(*tokens(1))
    allocated = cache.nbytes_allocated
    cache.attend(*tokens(19))
    assert cache.nbytes_allocated == allocated
    with pytest.raises(ValueError, match="max_length = 20 tokens fit into the cache, got 20 and 1 more"):
        cache.attend(*tokens(1))
    assert cache.length == 20


def test_memory_comes_back() -> None:
    cache = LayerCache(LAYOUT)
    cache.attend(*tokens(30))
    cache.reset()
    assert cache.nbytes_allocated == cache.length == 0 and cache.batch_size is None
    cache.attend(*tokens(3, batch=2))  # another batch
    assert cache.batch_size == 2


def test_an_evicted_key_is_never_seen_and_token_0_is_for_ever() -> None:
    layout = HeadLayout((3, None))
    cache = LayerCache(layout)
    q, k, v = tokens(1, layout=layout)
    k[:], v[:] = 1.0, 1000.0
    cache.attend(q, k, v)
    for _ in range(50):
        q, k, v = tokens(1, layout=layout)
        out = cache.attend(q, 0 * k, 0 * v)
    assert out[0, 0].abs().max() == 0.0
    assert out[0, 1].min() > 0.0


def test_crop_gives_back_what_rollback_allows() -> None:
    cache = LayerCache(LAYOUT, rollback=3)
    cache.attend(*tokens(20))
    with pytest.raises(ValueError, match=r"length must be at least 17: with rollback = 3 .* these 20 tokens"):
        cache.crop(16)
    cache.crop(17)
    assert cache.length == 17
    with pytest.raises(ValueError, match="length must be at most the 17 tokens in the cache, got 18"):
        cache.crop(18)
    short = LayerCache(LAYOUT)
    short.attend(*tokens(4))
    short.crop(0)  # nothing has left a ring yet
    assert short.length == 0


def test_recording_keeps_all_since_the_last_crop() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = HeadLayout((2, 5, None))
    cache = LayerCache(layout)
    empty = torch.zeros(1, 3, 0, HEAD_DIM)
    history = History(cache, empty, empty, None)
    cache.record_past = True
    for drafted in (30, 1, 7, 200, 3, 9):
        history.append(*tokens(drafted, layout=layout, generator=generator), ids=None)
        history.crop(drafted - 1)
        for _ in range(3):
            history.append(*tokens(1, layout=layout, generator=generator), ids=None)
        history.crop(2)


def test_moving_and_converting() -> None:
    torch.manual_seed(0)
    cache = LayerCache(LAYOUT)
    q, k, v = tokens(30)
    cache.attend(q, k, v)
    cache.to(dtype=torch.float64)
    new = tokens(1, dtype=torch.float64)
    got = cache.attend(*new)
    keys, values = (torch.cat([old.double(), later], 2) for old, later in ((k, new[1]), (v, new[2])))
    torch.testing.assert_close(got, attention(new[0], keys, values, LAYOUT), rtol=1e-12, atol=1e-12)


def test_sequences_are_repeated_and_selected() -> None:
    torch.manual_seed(0)
    cache = LayerCache(LAYOUT)
    q, k, v = tokens(30, batch=2)
    cache.attend(q, k, v)
    cache.repeat_interleave(2)
    cache.reorder(torch.tensor([3, 0, 2]))
    new = tokens(1, batch=3)
    keys, values = (torch.cat([old[[1, 0, 1]], later], 2) for old, later in ((k, new[1]), (v, new[2])))
    torch.testing.assert_close(
        cache.attend(*new), attention(new[0], keys, values, LAYOUT), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_errs_no_more_than_plain_attention() -> None:
    torch.manual_seed(0)
    layout = HeadLayout((6, 6, None), sink_tokens=1)
    kept = tokens(60, layout=layout)
    new = tokens(1, layout=layout)
    cache = LayerCache(layout)
    cache.attend(*(x.bfloat16() for x in kept))
    got = cache.attend(*(x.bfloat16() for x in new))
    keys, values = (torch.cat([a, b], 2).bfloat16() for a, b in zip(kept[1:], new[1:], strict=True))
    q = new[0].bfloat16()
    truth = attention(q.double(), keys.double(), values.double(), layout)
    plain = attention(q, keys, values, layout, backend="reference")
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_a_named_backend_serves_every_step(backend: str) -> None:
    torch.manual_seed(0)
    caches = LayerCache(LAYOUT), LayerCache(LAYOUT)
    for length in (9, 1, 3, 1):
        new = tokens(length)
        got, expected = caches[0].attend(*new, backend=backend), caches[1].attend(*new)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_packed_sequences_go_on_without_sinks_and_are_refused_with_them() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 5 + [1] * 8])
    plain = HeadLayout((4, None))
    cache = LayerCache(plain)
    q, k, v = tokens(13, layout=plain)
    cache.attend(q[:, :, :12], k[:, :, :12], v[:, :, :12], segment_ids=ids[:, :12])
    got = cache.attend(q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], segment_ids=ids)
    expected = attention(q, k, v, plain, segment_ids=ids)[:, :, 12:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cache = LayerCache(LAYOUT)
    cache.attend(*tokens(12), segment_ids=ids[:, :12])  # fine by itself
    with pytest.raises(ValueError, match="segment_ids must name one segment per sequence"):
        cache.attend(*tokens(1), segment_ids=ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": None}, "layout must be a HeadLayout, got NoneType"),
        ({"rollback": -1}, "rollback must be an integer >= 0, got -1"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LayerCache(**{"layout": LAYOUT, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \(batch, heads, new, head_dim\)"),
        (lambda q, k, v: (q, k[:, :1], v), "k must be .* with 2 heads"),
        (
            lambda q, k, v: (q, k, v.double()),
            "v must be torch.float32 on cpu as the cache, got torch.float64",
        ),
        (lambda q, k, v: (q[..., :4], k, v), "q must have the batch and head_dim of the cache, 1 and 8"),
        (lambda q, k, v: (q, [k], v), "k must be a torch.Tensor, got list"),
        (lambda q, k, v: (q, k.requires_grad_(), v), "q, k and v must not require grad"),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), "k must be .* at least one"),
    ],
)
def test_bad_tokens_change_nothing(make, message: str) -> None:
    cache = LayerCache(LAYOUT)
    cache.attend(*tokens(5))
    with pytest.raises((TypeError, ValueError), match=message):
        cache.attend(*make(*tokens(1)))
    assert cache.length == 5
    with pytest.raises(ValueError, match=r"segment_ids must be \(batch, kv_len\) = \(1, 6\), got \(1, 1\)"):
        cache.attend(*tokens(1), segment_ids=torch.zeros(1, 1, dtype=torch.int64))


def test_gradients_flow_through_the_first_tokens_alone() -> None:
    cache = LayerCache(LAYOUT)
    q, k, v = (x.requires_grad_() for x in tokens(5))
    cache.attend(q, k, v).sum().backward()
    kept = cache.stores[0].data
    assert k.grad is not None and kept is not None and not kept.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -1.0}, "softcap must be > 0 or None, got -1.0"),
        ({"alibi_slopes": torch.ones(1)}, r"alibi_slopes must be \(heads,\) = \(4,\), got \(1,\)"),
        ({"sink_logits": torch.ones(4, dtype=torch.int64)}, "sink_logits must have a floating dtype"),
        ({"segment_ids": torch.bool}, "segment_ids must have an integer dtype"),
        ({"segment_ids": [[0] * 6]}, "segment_ids must be a torch.Tensor, got list"),
        ({"backend": "gpu"}, "backend must be 'auto' or one of"),
        ({"round_probabilities": True, "backend": "cpu"}, "backend 'cpu' cannot serve this call"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("new", [1, 20])
def test_bad_options_change_nothing(options: dict, message: str, new: int) -> None:
    cache = LayerCache(HeadLayout((None, None, 4, 4), 2))
    cache.attend(*tokens(5))
    if options.get("segment_ids") is torch.bool:
        options = {"segment_ids": torch.ones(1, 5 + new, dtype=torch.bool)}
    with pytest.raises((TypeError, ValueError), match=message):
        cache.attend(*tokens(new), **options)
    assert [store.length for store in cache.stores] == [5, 5]


def test_keys_and_values_of_append_must_agree() -> None:
    _, k, v = tokens(3, batch=2)
    for wrong, message in (
        (v[:1], "v must have the batch and head_dim of the cache, 2 and 8"),
        (v.double(), "v must be torch.float32 on cpu as the cache, got torch.float64"),
        (v[..., :4], "v must have the batch and head_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerCache(LAYOUT).append(k, wrong)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_memory_of_its_own(copied) -> None:
    torch.manual_seed(0)
    cache = LayerCache(LAYOUT)
    for length in (10, 1):
        cache.attend(*tokens(length))
    other = copied(cache)
    first, second = tokens(1), tokens(1)
    expected = copied(cache).attend(*first, backend="reference")
    other.attend(*second)
    torch.testing.assert_close(cache.attend(*first), expected, rtol=1e-5, atol=1e-5)
    assert other.length == cache.length == 12


def test_a_window_of_any_size() -> None:
    torch.manual_seed(0)
    layout = HeadLayout((2**40,))
    cache = LayerCache(layout)
    q, k, v = tokens(4, layout=layout)
    cache.attend(q[:, :, :3], k[:, :, :3], v[:, :, :3])
    got = cache.attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(got, attention(q, k, v, layout)[:, :, 3:], rtol=1e-5, atol=1e-5)


def test_an_empty_cache_has_forgotten_everything() -> None:
    cache = LayerCache(LAYOUT)
    cache.expect(10_000)
    cache.attend(*tokens(5), segment_ids=torch.zeros(1, 5, dtype=torch.int64))
    cache.crop(0)
    ids = torch.ones(1, 6, dtype=torch.int64)
    cache.attend(*tokens(5), segment_ids=ids[:, :5])
    cache.attend(*tokens(1), segment_ids=ids)  # another segment, but one
    cache.reset()
    cache.attend(*tokens(10))
    assert cache.nbytes_allocated <= 1.5 * cache.nbytes_used


def test_recording_is_bounded() -> None:
    layout = HeadLayout((4, None))
    cache = LayerCache(layout)
    cache.record_past = True
    for _ in range(30):
        cache.attend(*tokens(100, layout=layout))
    local, _ = cache.stores
    assert local.data is not None and local.data.shape[3] <= 4 + 1024
    cache.crop(cache.length - 1024)


def test_long_chunks_with_sinks_cost_no_more_than_their_windows() -> None:
    layout = HeadLayout((8,), sink_tokens=2)
    cache = LayerCache(layout)
    cache.attend(*tokens(20, layout=layout))
    new = tokens(2000, layout=layout)
    with torch.profiler.profile(profile_memory=True) as profile:
        cache.attend(*new)
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest < 2000 * 2000  # bytes: no scores of all pairs, which would take four times as much
