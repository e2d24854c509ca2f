"""The functions that transformers calls: segments in place of masks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.huggingface.decoders import visible
from torch import nn
from transformers import LlamaConfig
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
)

from longshort import HeadLayout
from longshort.huggingface.interface import (
    Call,
    attend_by_layout,
    recording,
    segments_of_mask,
    within_sliding_window,
)


@st.composite
def batches(draw):
    """Lengths of packed sequences and of padding at either side, by row."""
    length = draw(st.integers(1, 9))
    packed = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.sets(st.integers(1, 8))) if packed else set()
        left, right = (0, 0) if packed else draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        rows.append((sorted(cut for cut in cuts if cut < length), left, right))
    return length, packed, rows


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 4), st.sampled_from([None, 2, 5]))
def test_segments_are_what_the_mask_of_sdpa_shows(batch, past, window):
    length, packed, rows = batch
    past = 0 if packed else past
    positions, mask = [], []
    for cuts, left, right in rows:
        bounds = [0, *cuts, length]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        positions.append(torch.cat([torch.arange(size) for size in sizes]))
        seen = torch.ones(past + length, dtype=torch.bool)
        seen[:left] = False
        if right:
            seen[-right:] = False
        mask.append(seen)
    positions, mask = torch.stack(positions), torch.stack(mask)
    config: Any = LlamaConfig()
    config._attn_implementation, config.sliding_window = "longshort", window
    inputs = torch.zeros(len(rows), length, 1)
    make: Any = create_causal_mask if window is None else create_sliding_window_causal_mask
    arguments = {"inputs_embeds": inputs, "attention_mask": None if packed else mask,
                 "past_key_values": OfLength(past) if past else None,
                 "position_ids": positions if packed else None}  # fmt: skip
    found = make(config, **arguments)
    segments = torch.zeros(len(rows), past + length) if found is None else found[:, 0, 0]
    seen = visible(HeadLayout((window,)), segments)[:, :, past:]
    config._attn_implementation = "sdpa"
    truth = make(config, **arguments, allow_is_causal_skip=False)
    is_token = torch.ones_like(segments, dtype=torch.bool) if packed else mask
    rows_of_tokens = is_token[:, None, past:, None]
    assert torch.equal(seen & rows_of_tokens, truth & rows_of_tokens)


class OfLength:
    """As much of a cache as masks ask for."""

    is_sliding = is_linear = is_dummy = (False,)
    is_compileable = False

    def __init__(self, length):
        self.length = length

    def get_query_offset(self, layer):
        return self.length

    def get_mask_sizes(self, queries, layer):
        return self.length + queries, 0


def test_nothing_is_read_twice_for_masks_that_hide_nothing():
    assert segments_of_mask(2, 5, 5) is None
    assert segments_of_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool)) is None
    assert segments_of_mask(1, 1, 6, q_offset=5) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"q_offset": 2}, "as many keys as tokens"),
        ({"q_offset": torch.tensor(0)}, "as many keys as tokens"),
        (
            {"attention_mask": torch.ones(2, 4)},
            "an entry for each of the 5 keys, cached ones included, got 4",
        ),
        ({"use_vmap": True, "mask_function": lambda batch, head, query, key: key <= query}, "of its own"),
        (
            {"use_vmap": True, "mask_function": or_masks(causal_mask_function, lambda *at: False)},
            "of its own",
        ),
        ({"mask_function": lambda batch, head, query, key: query >= 0}, "shows later keys"),
    ],
)
def test_masks_that_are_no_segments_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        segments_of_mask(2, 5, 5, **options)


def test_a_graph_checks_masks_too():
    looks_ahead = torch.compile(segments_of_mask, backend="eager")
    torch._dynamo.reset()
    assert looks_ahead(2, 5, 5, mask_function=lambda batch, head, query, key: query >= key) is not None
    with pytest.raises(RuntimeError, match="must be causal"):
        looks_ahead(2, 5, 5, mask_function=lambda batch, head, query, key: query >= 0)


def all_global(call: Call) -> HeadLayout:
    return HeadLayout((None,) * call.num_heads, call.num_kv_heads)


def test_other_sizes_of_values_are_filled_up():
    q, k, v = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 3)
    causal = torch.nn.functional.scaled_dot_product_attention
    for values in (v, torch.cat([v, v, v], -1)):
        with recording(all_global):
            out, weights = attend_by_layout(nn.Module(), q, k, values, None)
        assert weights is None
        torch.testing.assert_close(out, causal(q, k, values, is_causal=True).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": False}, "must be causal"),
        ({"output_attentions": True}, "no attention matrix"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "a mask per query and key"),
        ({"attention_mask": torch.zeros(1, 1, 1, 5, dtype=torch.int64)}, "kv_len = 4"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "batch": 2}, "a batch of 1"),
    ],
)
def test_bad_calls(options, reason):
    batch = options.pop("batch", 1)
    q, k, v = torch.randn(3, batch, 2, 4, 8)
    with recording(all_global), pytest.raises(ValueError, match=reason):
        attend_by_layout(nn.Module(), q, k, v, options.pop("attention_mask", None), **options)


def test_windows_within_a_sliding_window():
    layout = HeadLayout((3, 3, None, None, 9, 9), num_kv_heads=3, sink_tokens=2)
    assert within_sliding_window(layout, None) is layout
    assert within_sliding_window(layout, 5) == HeadLayout((3, 3, 5, 5, 5, 5), num_kv_heads=3)
