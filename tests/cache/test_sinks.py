"""`SinkTokens` finds the sinks of cached sequences, and refuses sequences of several segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import HeadLayout
from longshort.cache import LayerCache
from longshort.cache.sinks import SinkTokens

LAYOUT = HeadLayout((3, None), sink_tokens=2)


def attend(cache: LayerCache, ids: torch.Tensor) -> torch.Tensor:
    q, k, v = torch.randn(3, len(ids), 2, ids.shape[1] - cache.length, 8).unbind()
    return cache.attend(q, k, v, segment_ids=ids)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sinks_are_the_first_tokens_that_are_no_padding(data) -> None:
    count = data.draw(st.integers(1, 4), "count")
    rows = st.lists(st.integers(-1, 0), min_size=12, max_size=12)
    ids = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=3), "ids"))
    sinks, past = SinkTokens(count), 0
    for new in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), "new"):
        if data.draw(st.booleans(), "crop"):
            past = data.draw(st.integers(0, past), "length")
            sinks.crop(past)
        sinks.note(ids[:, : past + new], torch.zeros(len(ids), 1, new, 1), past)
        past += new
        wanted = [[j for j in range(past) if row[j] == 0][:count] for row in ids.tolist()]
        assert sinks.positions is not None
        found = [[int(at) for at in row if 0 <= at < past] for row in sinks.positions]
        assert found == wanted
        assert not sinks.are_known or all(len(row) == count and row[-1] < sinks.end for row in wanted)


@pytest.mark.parametrize("first", [[0, 0, 0, 0], [-1, -1, 0, 0], [-1, -1, -1, -1]])
def test_a_later_segment_is_refused_at_the_next_step(first: list[int]) -> None:
    ids = torch.tensor([[0] * 8, [*first, 0, -1, 1, 1]])
    cache = LayerCache(LAYOUT)
    for length in (4, 5, 6, 7):
        attend(cache, ids[:, :length])
    with pytest.raises(ValueError, match="segment_ids must name one segment per sequence"):
        attend(cache, ids)


def test_a_compiled_step_refuses_a_later_segment_without_a_look_at_it() -> None:
    torch.compiler.reset()
    step = torch.compile(attend, fullgraph=True, backend="eager")
    ids = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 1, 1]])
    cache = LayerCache(LAYOUT)
    attend(cache, ids[:, :5])
    for length in (6, 7, 8):
        step(cache, ids[:, :length])
    with pytest.raises(RuntimeError, match="segment_ids must name one segment per sequence"):
        step(cache, ids)
