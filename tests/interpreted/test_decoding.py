"""Interpreted decoding kernels: caches in random use, as the tests of caches have them for other backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cache import test_layer

from longshort import HeadLayout, attention
from longshort.backends import cpu
from longshort.backends.triton import cached
from longshort.cache import LayerCache

random_schedule = test_layer.test_random_schedules_equal_attention_over_everything.hypothesis.inner_test


@pytest.fixture(scope="module", autouse=True)
def steps():
    """Leave steps of one token to the kernels under test, and count them."""
    counted = []
    attend_cached = cached.attend_cached

    def counting(*args):
        counted.append(args)
        return attend_cached(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "supports_cached", lambda q, length: False)
        patch.setattr(cached, "attend_cached", counting)
        yield counted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_schedules(steps, data):
    random_schedule(data)


def test_the_kernels_ran(steps):
    assert len(steps) > 25


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.data())
def test_more_random_schedules(data):
    random_schedule(data)


def test_stores_of_several_splits():
    layout = HeadLayout((None, None, 140, 140), 2, sink_tokens=2)
    caches = [LayerCache(layout) for _ in range(2)]
    q, k, v = (torch.randn(2, heads, 400, 16) for heads in (4, 2, 2))
    for cache in caches:
        cache.append(k[:, :, :-1], v[:, :, :-1])
    q, k, v = (x[:, :, -1:] for x in (q, k, v))
    ours, expected = (
        cache.attend(q, k, v, backend=name)
        for cache, name in zip(caches, ("triton", "reference"), strict=True)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_half_precision():
    layout = HeadLayout((None, 5, 5), 3, sink_tokens=1)
    cache, exact = LayerCache(layout), LayerCache(layout)
    for new in (9, 1, 1, 1):
        q, k, v = (torch.randn(1, 3, new, 32).half() for _ in range(3))
        ours = cache.attend(q, k, v, backend="triton")
        expected = exact.attend(q.float(), k.float(), v.float(), backend="reference")
        torch.testing.assert_close(ours.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_keys_reach_nothing(value):
    """What has left a window, or is padding, changes no bit."""
    layout = HeadLayout((3, None), 2)
    ids = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0]])
    outs = []
    for planted in (0.7, value):
        torch.manual_seed(0)
        cache = LayerCache(layout, rollback=2)
        for begin, end in ((0, 6), (6, 7), (7, 8)):
            q, k, v = (torch.randn(1, 2, end - begin, 8) for _ in range(3))
            if begin == 0:
                k[:, :, 0] = v[:, :, 0] = planted
                k[:, 0, 4] = v[:, 0, 4] = (
                    planted  # position 4 is out of the window of 3 at the last step alone
                )
            out = cache.attend(q, k, v, segment_ids=ids[:, :end], backend="triton")
        outs.append(out)
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_the_operator_is_registered_well():
    layout = HeadLayout((None, 4), 2, sink_tokens=1)
    cache = LayerCache(layout, max_length=9)
    cache.append(*(torch.randn(1, 2, 6, 8) for _ in range(2)))
    kernel = cache._gpu_kernel
    q, k, v = (torch.randn(1, 2, 1, 8) for _ in range(3))
    arguments = (q, k, v, kernel._table, kernel.length, 9, torch.tensor([[0]]), kernel._windows, 0.3, None,
                 None, None, True)  # fmt: skip
    torch.library.opcheck(
        torch.ops.longshort.triton_attend_cached, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_padding_of_any_value_gives_zeros():
    layout = HeadLayout((3, None), 2)
    cache = LayerCache(layout)
    cache.append(*(torch.randn(2, 2, 4, 8) for _ in range(2)))
    q, k, v = (torch.randn(2, 2, 1, 8) for _ in range(3))
    k[1] = v[1] = torch.nan
    out = cache.attend(q, k, v, segment_ids=torch.tensor([[0] * 5, [0] * 4 + [-1]]), backend="triton")
    assert out[0].any() and not out[1].any()


def test_segment_ids_of_any_strides():
    layout = HeadLayout((3, None), 2)
    ids = torch.tensor([[0, -1, 0, 0, -1, 0], [-1, -1, 0, 0, 0, 0]])
    k, v, q = (torch.randn(2, 2, 6, 8) for _ in range(3))
    outs = []
    for given_ids in (ids, ids.T.contiguous().T):
        cache = LayerCache(layout)
        cache.append(k[:, :, :5], v[:, :, :5], given_ids[:, :5])
        last = (x[:, :, 5:] for x in (q, k, v))
        outs += [cache.attend(*last, segment_ids=given_ids, backend="triton")]
        outs += [attention(q, k, v, layout, segment_ids=given_ids, backend="triton")]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
