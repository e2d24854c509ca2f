"""Keys influence exactly the rows that see them across ranks, and planted faults are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_ranks

from longshort import HeadLayout
from longshort.distributed import attention as module
from longshort.distributed import check_influence, context_attention, visible_pairs
from longshort.distributed.plan import ContextPlan, Halo

_LAYOUT = HeadLayout((3, 3, 9, 9, None, None), num_kv_heads=3, sink_tokens=2)
_IDS = torch.tensor([0] * 5 + [1] * 14 + [2] * 2 + [-1] * 3)


def _halo_is_short(patch: pytest.MonkeyPatch) -> Any:
    halo = ContextPlan.halo

    def short(plan: Any, group: Any, sinks: int, rank: int) -> Halo:
        found = halo(plan, group, sinks, rank)
        return found._replace(start=min(found.start + 1, rank * plan.part))

    patch.setattr(ContextPlan, "halo", short)
    return context_attention


def _window_is_lost(patch: pytest.MonkeyPatch) -> Any:
    everything = HeadLayout((None,) * 6, 3)
    return lambda q, k, v, layout, **options: context_attention(q, k, v, everything, **options)


def _sink_is_missing(patch: pytest.MonkeyPatch) -> Any:
    sinks = ContextPlan._sinks
    patch.setattr(ContextPlan, "_sinks", lambda *arguments: sinks(*arguments)[1:])
    return context_attention


def _alignment_is_off(patch: pytest.MonkeyPatch) -> Any:
    attention = module.attention

    def late(q: Any, k: Any, v: Any, layout: Any, **options: Any) -> Any:
        if layout.windows[0] is not None and k.shape[2] > q.shape[2]:
            k, v = (torch.cat([x[:, :, 1:], x[:, :, -1:]], 2) for x in (k, v))
        return attention(q, k, v, layout, **options)

    patch.setattr(module, "attention", late)
    return context_attention


def _segments_are_lost(patch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments, segment_ids, **options: context_attention(*arguments, **options)


_FAULTS = (_halo_is_short, _window_is_lost, _sink_is_missing, _alignment_is_off, _segments_are_lost)


def influences() -> list[str]:
    """Check right attention in several ways, then each fault; return what was said about the faults."""
    length = 6 * dist.get_world_size()
    ids = _IDS[:length]
    ways: list[dict[str, Any]] = [{}, {"lend": False}, {"gather_memory": 0}]
    for way in ways:
        for segments in (None, ids):

            def attend(*arguments: Any, way: Any = way, **options: Any) -> Any:
                return context_attention(*arguments, **way, **options)

            check_influence(attend, _LAYOUT, length, segment_ids=segments)
    found = []
    for fault in _FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            attend = fault(patch)
            said = f"{fault.__name__}: not found"
            for segments in (None, ids):  # one may have a segment's border where the fault is
                try:
                    check_influence(attend, _LAYOUT, length, segment_ids=segments)
                except AssertionError as error:
                    said = str(error)
            found.append(said)
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_key_influences_the_rows_that_see_it(ranks: int) -> None:
    results = run_ranks(influences, ranks)
    assert all(result == results[0] for result in results)
    for text in results[0]:
        assert "not found" not in text
        assert "influence" in text
        assert "row" in text


def test_pairs_are_those_of_the_definition() -> None:
    layout = HeadLayout((2, None), sink_tokens=1)
    ids = torch.tensor([0, 0, 0, 1, 0, -1])
    local, everything = visible_pairs(layout, 6, ids)
    assert everything[4].tolist() == [True, True, True, False, True, False]
    assert local[4].tolist() == [True, False, False, False, True, False]
    assert local[2].tolist() == [True, True, True, False, False, False]
    assert not local[5].any()
    assert not everything[:, 5].any()
