import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshort import HeadGroup, HeadLayout


@st.composite
def layouts(draw) -> HeadLayout:
    group_size = draw(st.integers(1, 3))
    per_kv_head = draw(st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=5))
    windows = tuple(window for window in per_kv_head for _ in range(group_size))
    return HeadLayout(windows, len(per_kv_head), draw(st.integers(0, 5)))


def visible(layout: HeadLayout, head: int, query: int, key: int) -> bool:
    window = layout.windows[head]
    in_reach = window is None or query - window < key or key < layout.sink_tokens
    return key <= query and in_reach


@given(layouts(), st.integers(0, 30), st.integers(0, 30))
def test_score_count_counts_the_visible_pairs(layout: HeadLayout, a: int, b: int):
    q_len, kv_len = sorted((a, b))
    counted = sum(
        visible(layout, head, query, key)
        for head in range(layout.num_heads)
        for query in range(kv_len - q_len, kv_len)
        for key in range(kv_len)
    )
    assert layout.score_count(q_len, kv_len) == counted


@given(layouts(), st.integers(0, 60), st.integers(1, 64))
def test_kv_bytes_counts_the_keys_that_a_later_query_may_see(layout: HeadLayout, length: int, head_dim: int):
    kept = sum(
        key >= length - (length if window is None else window) or key < layout.sink_tokens
        for window in layout.windows[:: layout.group_size]
        for key in range(length)
    )
    assert layout.kv_bytes(length, head_dim, torch.bfloat16) == 2 * kept * head_dim * 2
    assert layout.kv_bytes(length, head_dim, torch.float32) == 2 * kept * head_dim * 4


@given(layouts())
def test_groups_partition_the_heads(layout: HeadLayout):
    heads = [head for group in layout.groups for head in group.heads]
    assert sorted(heads) == list(range(layout.num_heads))
    for group in layout.groups:
        assert {layout.windows[head] for head in group.heads} == {group.window}
        assert group.kv_heads == tuple(sorted({head // layout.group_size for head in group.heads}))
    assert len({group.window for group in layout.groups}) == len(layout.groups)
    assert sorted(layout.local_heads + layout.global_heads) == list(range(layout.num_heads))


@given(layouts())
def test_its_print_is_one_line_that_makes_it_again(layout: HeadLayout):
    assert "\n" not in repr(layout)
    again = eval(repr(layout), {"HeadLayout": HeadLayout})
    assert again == layout
    assert hash(again) == hash(layout)


def test_split_puts_local_heads_first():
    layout = HeadLayout.split(num_heads=12, num_global=1, window=100)
    assert layout.windows == (100,) * 11 + (None,)
    assert layout.num_kv_heads == 12
    assert str(layout) == "HeadLayout(windows=(100,) * 11 + (None,))"
    assert layout.groups == (
        HeadGroup(100, tuple(range(11)), tuple(range(11))),
        HeadGroup(None, (11,), (11,)),
    )


def test_split_with_shared_key_value_heads():
    layout = HeadLayout.split(6, num_global=2, window=8, num_kv_heads=3, sink_tokens=4)
    assert layout == HeadLayout((8, 8, 8, 8, None, None), num_kv_heads=3, sink_tokens=4)
    assert layout.group_size == 2
    assert HeadLayout.split(4, 0, 8).global_heads == ()
    assert HeadLayout.split(4, 4, 8).local_heads == ()


def test_a_layout_is_frozen_and_takes_any_sequence():
    layout = HeadLayout([np.int64(16), None])  # type: ignore[arg-type]
    assert layout.windows == (16, None)
    assert type(layout.windows[0]) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.sink_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": ()}, r"windows must name at least one head"),
        ({"windows": 5}, r"windows must be a sequence .* got 5"),
        ({"windows": "ab"}, r"windows must be a sequence .* got 'ab'"),
        ({"windows": (4, 0)}, r"windows\[1\] must be an integer >= 1, got 0"),
        ({"windows": (True,)}, r"windows\[0\] must be an integer >= 1, got True"),
        ({"windows": (2.0,)}, r"windows\[0\] must be an integer >= 1, got 2.0"),
        ({"windows": (4, 4, 4), "num_kv_heads": 2}, r"num_kv_heads must divide .* \(3\), got 2"),
        ({"windows": (4, 4), "num_kv_heads": 0}, r"num_kv_heads must be an integer >= 1, got 0"),
        ({"windows": (4, 4), "num_kv_heads": True}, r"num_kv_heads must be an integer >= 1, got True"),
        ({"windows": (4, 4), "num_kv_heads": 4}, r"num_kv_heads must divide .* got 4"),
        ({"windows": (4, None), "num_kv_heads": 1}, r"windows of query heads that share .*\(4, None\)"),
        ({"windows": (4,), "sink_tokens": -1}, r"sink_tokens must be an integer >= 0, got -1"),
    ],
)
def test_bad_layouts_are_named(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HeadLayout(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 4), r"num_heads must be an integer >= 1, got 0"),
        ((4, -1, 4), r"num_global must be an integer >= 0, got -1"),
        ((4, 5, 4), r"num_global must be at most num_heads \(4\), got 5"),
        ((4, 1, 0), r"window must be an integer >= 1, got 0"),
        ((4, 1, None), r"window must be an integer >= 1, got None"),
        ((4, 1, 4, 2), r"num_global must be a multiple of the 2 query heads .* got 1"),
        ((4, 2, 4, 3), r"num_kv_heads must divide .* got 3"),
        ((7, 1, 16, 3), r"num_kv_heads must divide .* got 3"),
        ((4, 1, 4, None, 1.5), r"sink_tokens must be an integer >= 0, got 1.5"),
    ],
)
def test_bad_splits_are_named(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        HeadLayout.split(*arguments)


def test_bad_lengths_are_named():
    layout = HeadLayout.split(4, 1, 8)
    with pytest.raises(ValueError, match=r"q_len must be at most kv_len \(3\), got 4"):
        layout.score_count(4, 3)
    with pytest.raises(ValueError, match=r"kv_len must be an integer >= 0, got -1"):
        layout.score_count(0, -1)
    with pytest.raises(ValueError, match=r"length must be an integer >= 0, got -1"):
        layout.kv_bytes(-1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"head_dim must be an integer >= 1, got 0"):
        layout.kv_bytes(1, 0, torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got str"):
        layout.kv_bytes(1, 64, "float32")  # type: ignore[arg-type]


def test_equals_compares_as_the_operator_does() -> None:
    layout = HeadLayout((4, 4, None, None), 2, sink_tokens=1)
    others = [
        layout, HeadLayout((4, 4, None, None), 2, sink_tokens=1), HeadLayout((4, 4, None, None), 2),
        HeadLayout((4, 4, None, None), sink_tokens=1), HeadLayout((5, 5, None, None), 2, sink_tokens=1),
        HeadLayout((4, 4), 2, sink_tokens=1), None, (4, 4, None, None),
    ]  # fmt: skip
    assert [layout.equals(other) for other in others] == [layout == other for other in others]
