"""Budgets for heads, and how they are written."""

import pytest
from tests.conversion.models import random_llama

from longshort.conversion.budget import KeepHeads, LimitCache, LimitRise, parse_share
from longshort.conversion.heads import find_heads


@pytest.fixture(scope="module")
def heads():
    return find_heads(random_llama())


@pytest.mark.parametrize(
    ("text", "share"),
    [("25%", 0.25), ("0.25", 0.25), (" 12.5 % ", 0.125), (".5", 0.5), ("0", 0.0), ("1", 1.0)],
)
def test_a_share_is_written_in_two_ways(text, share):
    assert parse_share("--keep", text) == KeepHeads(share)


@pytest.mark.parametrize("text", ["25", "101%", "-1%", "", "half", "1e-1", "25%%"])
def test_other_texts_are_no_share(text):
    with pytest.raises(ValueError, match=r"^--keep must be a share such as 25% or 0.25, got"):
        parse_share("--keep", text)


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.16, 0), (1 / 6, 1), (0.34, 2), (0.99, 5), (1.0, 6)])
def test_a_share_allows_no_head_more(heads, share, most):
    assert KeepHeads(share).most_heads(heads, 8, 2) == most


def test_a_cache_allows_as_many_heads_as_fit(heads):
    def size(count: int) -> int:
        return heads.cache_bytes(heads.layouts(heads.candidates[:count], 8, 2), 1000, 2)

    for count in range(7):
        assert LimitCache(size(count), 1000).most_heads(heads, 8, 2) == count
        assert LimitCache(size(count) + 1, 1000).most_heads(heads, 8, 2) == count
    with pytest.raises(ValueError, match=r"size must be at least .* if all heads are local"):
        LimitCache(size(0) - 1, 1000).most_heads(heads, 8, 2)


@pytest.mark.parametrize("nats", [0, -0.1, float("nan"), True])
def test_a_rise_is_a_positive_number(nats):
    with pytest.raises(ValueError, match="nats must be"):
        LimitRise(nats)
