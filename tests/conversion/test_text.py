"""Windows of text: parts that share nothing, and what is held out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshort.conversion.text import cut_parts, read_tokens, split_held_out
from longshort.data import byte_tokenizer


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    length=st.integers(2, 9),
    more=st.integers(0, 50),
    has_first=st.booleans(),
)
def test_no_two_windows_share_a_token(counts, length, more, has_first):
    first = 10**6 if has_first else None
    taken = length - has_first
    tokens = torch.arange(sum(counts) * taken + more)
    parts = cut_parts(tokens, length, counts, first)
    assert [tuple(part.shape) for part in parts] == [(count, length) for count in counts]
    if has_first:
        assert all(bool((part[:, 0] == first).all()) for part in parts)
        parts = [part[:, 1:] for part in parts]
    windows = torch.cat(parts)
    assert bool((windows[:, 1:] - windows[:, :-1] == 1).all())
    assert len(windows.unique()) == windows.numel()
    for one, other in pairwise(parts):
        assert one.max() < other.min()


def test_windows_are_spread_over_the_text():
    (part,) = cut_parts(torch.arange(1000), 10, [4])
    assert part[:, 0].tolist() == [0, 250, 500, 750]


@pytest.mark.parametrize(
    ("length", "counts", "message"),
    [
        (1, [1], "length must be"),
        (2, [0], "every entry of counts must be"),
        (10, [3, 8], "text must have at least 110 tokens for 11 windows of 10, got 100"),
    ],
)
def test_what_cannot_be_cut_is_refused(length, counts, message):
    with pytest.raises(ValueError, match=message):
        cut_parts(torch.arange(100), length, counts)


def test_texts_are_read_with_an_end_after_each(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>")
    (tmp_path / "b.txt").write_text("two")
    tokenizer = byte_tokenizer()
    ids = read_tokens(tmp_path, tokenizer).tolist()
    assert ids == [*b"one<|endoftext|>", 256, *b"two", 256]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-text token"):
        read_tokens(tmp_path, tokenizer)


def test_what_is_held_out_is_the_end():
    searched, held_out = split_held_out(torch.arange(100))
    assert torch.cat([searched, held_out]).tolist() == list(range(100))
    assert len(held_out) == 30
