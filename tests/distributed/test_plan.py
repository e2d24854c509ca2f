"""Plans cover every query once, count pairs exactly, and share the work of global heads evenly."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longshort import HeadLayout
from longshort.distributed import (
    Traffic,
    all_gather_bytes,
    join_parts,
    layer_traffic,
    part_length,
    part_positions,
    plan_context,
    take_part,
    visible_pairs,
)
from longshort.layout import HeadGroup

_GLOBAL = HeadLayout((None,))


@st.composite
def segments(draw: st.DrawFn) -> tuple[int, Tensor]:
    ranks, part, batch = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    row = st.lists(st.integers(-1, 2), min_size=ranks * part, max_size=ranks * part)
    return ranks, torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@given(segments(), st.integers(0, 3), st.integers(1, 8))
def test_every_query_is_computed_once_with_its_keys(
    case: tuple[int, Tensor], sinks: int, window: int
) -> None:
    ranks, ids = case
    batch, length = ids.shape
    plan = plan_context(ranks, length, batch=batch, segment_ids=ids)
    visible = torch.stack([visible_pairs(_GLOBAL, length, row)[0] for row in ids])
    pairs = visible.sum(-1)
    assert sum(plan.pairs) == sum(plan.pairs_before) == pairs.sum()
    covered = torch.zeros(batch, length, dtype=torch.int64)
    for rank in range(ranks):
        work = 0
        for span in [*plan.spans(rank), *plan.borrowed(rank)]:
            rows, queries = slice(*span.rows), slice(span.start, span.end)
            covered[rows, queries] += 1
            work += int(pairs[rows, queries].sum())
            assert not visible[rows, queries, : span.first_key].any()
            assert not visible[rows, queries, span.end :].any()
        assert work == plan.pairs[rank]
        own = slice(rank * plan.part, (rank + 1) * plan.part)
        assert plan.pairs_before[rank] == pairs[:, own].sum()
        layout = HeadLayout((window,), sink_tokens=sinks)
        halo = plan.halo(layout.groups[0], sinks, rank)
        for row in range(batch):
            near = visible_pairs(layout, length, ids[row])[0, own].any(0).nonzero()[:, 0].tolist()
            held = {*halo.sinks[row], *range(halo.start, own.stop)}
            assert held.issuperset(near)
            assert all(position < halo.start for position in halo.sinks[row])
    assert (covered == 1).all()


def _packed(length: int, choose: random.Random, kind: str) -> Tensor:
    sizes = []
    while sum(sizes) < length:
        longest = {"short": 200, "long": length // 2, "mixed": 2 ** choose.randint(1, 17)}[kind]
        sizes.append(choose.randint(1, longest))
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:length]


@pytest.mark.parametrize(("length", "ranks"), [(131_072, 8), (1_048_576, 64)])
def test_work_is_even(length: int, ranks: int) -> None:
    choose = random.Random(0)
    one = plan_context(ranks, length)
    assert one.imbalance_before == pytest.approx(2 - 1 / ranks, rel=1e-3)
    assert one.imbalance <= 1.05
    assert one.lent_rows <= 0.2 * length
    giant = torch.cat([torch.arange(length // 2), torch.full((length // 2,), length)])
    rows = [_packed(length, choose, kind) for kind in ("short", "long", "mixed") * 2]
    for ids in [giant, *rows]:
        plan = plan_context(ranks, length, segment_ids=ids[None])
        assert plan.imbalance <= min(1.05, plan.imbalance_before)
    batch = torch.stack(rows[:4])
    assert plan_context(ranks, length, batch=4, segment_ids=batch).imbalance <= 1.05


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.lists(st.sampled_from([None, 1, 3, 17]), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(1, 2),
)
def test_formulas_count_what_plans_count(
    ranks: int, part: int, windows: list[int | None], sinks: int, batch: int
) -> None:
    layout = HeadLayout(tuple(windows), sink_tokens=sinks)
    plan = plan_context(ranks, ranks * part, batch=batch)
    counted = Traffic.mean(plan.traffic(layout, 8, 4))
    formula = layer_traffic(layout, 8, 4, ranks * part, ranks, batch=batch, lent_rows=plan.lent_rows)
    assert vars(counted) == pytest.approx(vars(formula))


def test_traffic_is_a_tenth_of_an_all_gather() -> None:
    layout = HeadLayout.split(12, 1, 100)
    plan = plan_context(4, 16_384)
    traffic = Traffic.mean(plan.traffic(layout, 64, 4))
    whole = all_gather_bytes(layout, 64, 4, 16_384, 4)
    assert whole == 2 * 12 * 64 * 4 * 16_384 * 3 // 4
    assert traffic.total <= whole / 10
    assert traffic.halo <= 11 * 2 * 64 * 4 * 99
    assert 0 < traffic.lent <= 64 * 4 * 16_384 / 4


@pytest.mark.parametrize("length", [1, 5, 8, 9])
def test_parts_join_to_the_whole(length: int) -> None:
    whole = torch.arange(2 * length).view(2, length)
    parts = [take_part(whole, rank, 4, fill=-7) for rank in range(4)]
    assert {part.shape[1] for part in parts} == {part_length(length, 4)}
    assert torch.equal(join_parts(parts, length), whole)
    assert (torch.cat(parts, 1)[:, length:] == -7).all()
    positions = torch.cat([part_positions(length, rank, 4) for rank in range(4)], 1)[0]
    assert positions[:length].tolist() == list(range(length))
    assert positions.max() == length - 1


def test_bad_input_is_named() -> None:
    for message, call in (
        ("ranks must be an integer >= 1, got 0", lambda: plan_context(0, 8)),
        ("length must be a multiple of the 3 ranks, padding included, got 8", lambda: plan_context(3, 8)),
        (
            "segment_ids must be integers, .* = \\(1, 8\\)",
            lambda: plan_context(2, 8, segment_ids=torch.zeros(1, 7)),
        ),
        ("rank must be below the 2 ranks, got 2", lambda: take_part(torch.zeros(1, 4), 2, 2)),
        ("length must be at most the 4 tokens", lambda: join_parts([torch.zeros(1, 2)] * 2, 5)),
        ("head_dim must be an integer >= 1", lambda: layer_traffic(_GLOBAL, 0, 2, 8, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"segment_ids must be a torch\.Tensor"):
        plan_context(2, 8, segment_ids=[0] * 8)  # pyright: ignore[reportArgumentType]


def test_no_window_reaches_before_the_sequence() -> None:
    plan = plan_context(4, 16)
    halo = plan.halo(HeadGroup(100, (0,), (0,)), 3, 2)
    assert (halo.start, halo.slots) == (0, 0)
