"""NaN and inf in a cache reach the tokens that see them, and change no bit of others."""

from __future__ import annotations

import pytest
import torch
from tests.attention_cases import RUNNABLE
from torch import Tensor

from longshort import HeadLayout
from longshort.cache import LayerCache

HEAD_DIM = 8
WINDOW = 5
NONFINITE = [torch.nan, torch.inf, -torch.inf]
LAYOUT = HeadLayout((WINDOW, WINDOW, None, None), num_kv_heads=2)
WITH_SINKS = HeadLayout((WINDOW, WINDOW, None, None), num_kv_heads=2, sink_tokens=2)
# cpu's kernel of one token at a time passes on 0·NaN; of other backends each serves what it is asked for
STEPS = [[9, 1, 1, 1], [9, 7, 1, 4], [3, 20, 3, 30, 1], [40, 2]]


def tokens(length: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, HEAD_DIM, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def attend_in_steps(
    cache: LayerCache, steps: list[int], entry: float, poisoned: Tensor, ids: Tensor | None, backend: str
) -> Tensor:
    """Outputs of all tokens; the keys and values of the poisoned ones, (batch, length), are `entry`."""
    q, k, v = tokens(sum(steps), seed=0)
    k, v = (x.masked_fill(poisoned[:, None, :, None], entry) for x in (k, v))
    outs, end = [], 0
    for step in steps:
        begin, end = end, end + step
        seen = None if ids is None else ids[:, :end]
        new = (x[:, :, begin:end] for x in (q, k, v))
        outs.append(cache.attend(*new, segment_ids=seen, backend=backend))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("layout", [LAYOUT, WITH_SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_key_that_left_its_window(backend: str, layout: HeadLayout, steps: list[int], value: float):
    """Key 4 of one sequence: of a local head it is gone after its window."""
    length = sum(steps)
    poisoned = torch.zeros(2, length, dtype=torch.bool)
    poisoned[1, 4] = True
    ours, expected = (
        attend_in_steps(LayerCache(layout, rollback=2), steps, entry, poisoned, None, backend)
        for entry in (value, 0.5)
    )
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1, :, :4], expected[1, :, :4])
    assert torch.equal(ours[1, :2, 4 + WINDOW :], expected[1, :2, 4 + WINDOW :])
    assert not ours[1, :2, 4 : 4 + WINDOW].isfinite().any()
    assert not ours[1, 2:, 4:].isfinite().any()


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("layout", [LAYOUT, WITH_SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_padding_may_hold_anything(backend: str, layout: HeadLayout, steps: list[int], value: float):
    length = sum(steps)
    generator = torch.Generator().manual_seed(1)
    ids = torch.where(torch.rand(2, length, generator=generator) < 0.3, -1, 0)
    ids[0, :3] = -1
    ours, expected = (
        attend_in_steps(LayerCache(layout), steps, entry, ids < 0, ids, backend) for entry in (value, 0.5)
    )
    assert torch.equal(ours, expected)
    assert ours.isfinite().all()


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_other_segments_may_hold_anything(backend: str, steps: list[int], value: float):
    length = sum(steps)
    ids = (torch.arange(length) % 3 == 1).long().expand(2, -1)
    ours, expected = (
        attend_in_steps(LayerCache(LAYOUT), steps, entry, ids == 1, ids, backend) for entry in (value, 0.5)
    )
    assert torch.equal(ours[:, :, ids[0] == 0], expected[:, :, ids[0] == 0])


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("layout", [LAYOUT, WITH_SINKS], ids=["plain", "sinks"])
def test_unused_memory_and_what_was_taken_back(backend: str, layout: HeadLayout, steps: list[int]):
    """Whatever is in the store beyond its tokens, and in the slots of tokens that were cropped."""
    nothing = torch.zeros(2, sum(steps), dtype=torch.bool)
    expected = attend_in_steps(LayerCache(layout, rollback=3), steps, 0.0, nothing, None, backend)
    cache = LayerCache(layout, rollback=3)
    q, k, v = tokens(sum(steps), seed=0)
    outs, end = [], 0
    for step in steps:
        begin, end = end, end + step
        outs.append(cache.attend(*(x[:, :, begin:end] for x in (q, k, v)), backend=backend))
        for store in cache.stores:
            data = store.tensors()[0]
            if store.length < data.shape[3]:
                data[:, :, :, store.length :] = torch.nan  # not written yet
        draft = tokens(2, seed=9)
        cache.attend(draft[0], draft[1] * torch.nan, draft[2] * torch.inf, backend=backend)
        cache.crop(end)
    assert torch.equal(torch.cat(outs, 2), expected)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("options", [{"round_probabilities": True}, {"softcap": 2.0}], ids=str)
def test_a_sink_that_moved_away_is_seen_for_ever(options: dict, value: float):
    """In one head; the other does not see it."""
    cache, other = LayerCache(WITH_SINKS), LayerCache(WITH_SINKS)
    for position, length in enumerate((1, 30, 12, 12)):
        q, k, v = tokens(length, seed=position)
        poisoned = v.clone()
        if position == 0:
            poisoned[:, 0, 0, 3] = value
        ours = cache.attend(q, k, poisoned, backend="blockwise", **options)
        expected = other.attend(q, k, v, backend="blockwise", **options)
        assert not ours[:, :2, :, 3].isfinite().any()
        assert torch.equal(ours[:, :2, :, :3], expected[:, :2, :, :3])
        assert torch.equal(ours[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize(
    "transform",
    [
        lambda cache, q, k, v: torch.func.jvp(lambda q: cache.attend(q, k, v), (q,), (q,)),
        lambda cache, q, k, v: torch.func.grad(lambda q: cache.attend(q, k, v).sum())(q),
        lambda cache, q, k, v: torch.func.vmap(cache.attend)(q[None], k[None], v[None]),
        lambda cache, q, k, v: torch.func.vmap(cache.append)(k[None], v[None]),
    ],
    ids=["jvp", "grad", "vmap", "vmap-append"],
)
def test_a_cache_refuses_transforms(transform, length: int):
    new = tokens(3, seed=0)
    cache = LayerCache(LAYOUT)
    if length:
        cache.attend(*new)
    with pytest.raises(ValueError, match="it cannot be filled inside of torch"):
        transform(cache, *new)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        cache.attend(*new)
    assert cache.length == length
