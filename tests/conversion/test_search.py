"""The search on losses that are known exactly."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshort.conversion.heads import KVHead
from longshort.conversion.search import (
    add_units,
    by_score,
    descend,
    exchange,
    fewest_within,
    first_units,
    greedy_order,
    head_units,
    layer_units,
    score_path,
)


class Sums:
    """Heads whose loss is a sum over heads, less what pairs have together, in place of a decoder's."""

    def __init__(self, values: list[int], pairs: dict[tuple[int, int], int] | None = None) -> None:
        self.candidates = tuple(KVHead(index // 2, index % 2) for index in range(len(values)))
        self.values = dict(zip(self.candidates, values, strict=True))
        self.pairs = {
            (self.candidates[a], self.candidates[b]): value for (a, b), value in (pairs or {}).items()
        }

    def loss_at(self, gates) -> float:
        alone = sum(value * (1 - gates[head]) for head, value in self.values.items())
        return alone + sum(value * (1 - gates[a]) * (1 - gates[b]) for (a, b), value in self.pairs.items())

    def loss(self, kept) -> float:
        return self.loss_at({head: float(head in kept) for head in self.candidates})

    def slopes(self, gates):
        ends = {head: [self.loss_at({**gates, head: end}) for end in (0.0, 1.0)] for head in self.candidates}
        return {head: open_ - closed for head, (closed, open_) in ends.items()}  # linear in each gate

    def changes(self, kept, units):
        return [self.loss(kept ^ unit) - self.loss(kept) for unit in units]

    def best(self, most: int) -> float:
        return min(self.loss(frozenset(some)) for some in itertools.combinations(self.candidates, most))


def decoder_of(values: list[int], pairs: dict[tuple[int, int], int] | None = None) -> Any:
    """Return what the search asks of a decoder."""
    return Sums(values, pairs)


VALUES = st.lists(st.integers(0, 100), min_size=2, max_size=8)


@given(values=VALUES, most=st.integers(0, 8))
def test_without_interplay_every_order_is_the_best(values, most):
    decoder = decoder_of(values)
    most = min(most, len(values))
    units = head_units(decoder)
    scores = score_path(decoder, (0.75, 0.25), decoder.slopes)
    assert scores == pytest.approx(decoder.values)
    for order in (
        greedy_order(units, most, decoder.changes),
        by_score(scores, units),
        by_score(descend(decoder, scores, most, 2, decoder.slopes), units),
    ):
        assert sorted(map(sorted, order)) == sorted(map(sorted, units))
        kept = first_units(order, most)
        assert len(kept) == most
        assert decoder.loss(kept) == decoder.best(most)


PAIRS = {(0, 1): 50, (2, 3): 30, (0, 4): 20}  # each replaces the other


def test_ranking_anew_sees_what_heads_do_together():
    decoder = decoder_of([1, 2, 3, 4, 5, 6], {(0, 2): 50})
    units = head_units(decoder)
    costs = decoder.changes(frozenset(decoder.candidates), units)
    once = first_units(by_score(dict(zip(decoder.candidates, costs, strict=True)), units), 3)
    anew = first_units(greedy_order(units, 3, decoder.changes), 3)
    assert decoder.loss(anew) < decoder.loss(once)


@given(
    values=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    chosen=st.sets(st.integers(0, 5), min_size=1, max_size=5),
)
def test_an_exchange_never_raises_the_loss_and_finds_single_ones(values, chosen):
    decoder = decoder_of(values, PAIRS)
    kept = frozenset(decoder.candidates[index] for index in chosen)
    better = exchange(kept, head_units(decoder), 6, 9, decoder.changes, decoder.changes, decoder.loss)
    assert len(better) == len(kept)
    assert decoder.loss(better) <= decoder.loss(kept)


def test_an_exchange_of_the_wrong_head_for_the_right_one():
    decoder = decoder_of([9, 1, 8, 1, 7, 2])
    wrong = frozenset(decoder.candidates[index] for index in (0, 1, 3))
    better = exchange(wrong, head_units(decoder), 2, 3, decoder.changes, decoder.changes, decoder.loss)
    assert decoder.loss(better) == decoder.best(3)


def test_layers_change_as_a_whole():
    decoder = decoder_of([9, 0, 3, 3, 4, 1])
    units = layer_units(decoder)
    assert [sorted(unit) for unit in units] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]]
    scores = {head: float(value) for head, value in decoder.values.items()}
    assert first_units(by_score(scores, units), 5) == units[0] | units[1]
    assert first_units(greedy_order(units, 3, decoder.changes), 3) == units[0]


@given(values=VALUES, highest=st.integers(0, 300))
def test_as_few_heads_as_a_loss_allows(values, highest):
    decoder = decoder_of(values)
    order = by_score({head: float(value) for head, value in decoder.values.items()}, head_units(decoder))
    kept = fewest_within(order, highest, decoder.loss)
    assert decoder.loss(kept) <= highest
    assert not kept or decoder.loss(first_units(order, len(kept) - 1)) > highest


def test_what_fits_is_added():
    decoder = decoder_of([1, 5, 3, 4])
    kept = add_units(head_units(decoder), frozenset(), 3, decoder.changes)
    assert kept == frozenset(decoder.candidates[1:])
    assert add_units(layer_units(decoder), frozenset(), 3, decoder.changes) == frozenset(
        decoder.candidates[2:]
    )
