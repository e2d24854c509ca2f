"""The probe against logits computed by hand, and that probing changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from tests.stability.test_monitor import MIXED, recording, stack_of

from longshort.layout import HeadLayout
from longshort.stability import AttentionProbe
from longshort.stability.probe import QUANTILE

SEGMENTS = torch.tensor([[0] * 9 + [1] * 20 + [-1] * 3, [4] * 32])


def by_hand(observation, layout, stride, band, segment_ids):
    """Per head the largest |logit|, its percentile and the largest row range, by loops over rows."""
    q, k = observation.q.double(), observation.k.double()
    slopes = observation.options["alibi_slopes"]
    length = k.shape[2]
    rows = range((length - 1) % stride, length, stride)
    found = []
    for head, window in enumerate(layout.windows):
        logits, ranges = [], [0.0]
        for sequence in range(q.shape[0]):
            ids = segment_ids[sequence]
            for i in rows:
                seen = [
                    j
                    for j in range(i + 1)
                    if ids[i] == ids[j] >= 0
                    and (window is None or i - j < window or (ids[:j] == ids[j]).sum() < layout.sink_tokens)
                    and (band is None or i - j < band)
                ]
                keys = k[sequence, head // layout.group_size, seen]
                row = q[sequence, head, i] @ keys.T / q.shape[3] ** 0.5
                logits += row.abs().tolist()
                if slopes is not None:
                    row = row + slopes[head] * torch.tensor(seen)
                ranges += [float(row.max() - row.min())] if seen else []
        logits.sort()
        found.append((logits[-1], logits[math.ceil(QUANTILE * len(logits)) - 1], max(ranges)))
    return found


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("alibi_slopes", [None, (0.5, 0.1, 0.0, 0.3, 1.0, 0.2)], ids=["plain", "alibi"])
@pytest.mark.parametrize("stride", [1, 5])
def test_statistics_are_those_of_the_rows_that_are_probed(stride, alibi_slopes, segment_ids):
    model = stack_of(MIXED, HeadLayout((None,) * 6), alibi_slopes=alibi_slopes)
    probe = AttentionProbe(model, 4, stride)
    x = torch.randn(2, 32, 48)
    with torch.no_grad(), recording(model) as seen, probe.observing():
        model(x, segment_ids)
    found = probe.reading()
    ids = torch.zeros(2, 32, dtype=torch.int64) if segment_ids is None else segment_ids
    for index, (observation, layer) in enumerate(zip(seen, model.layers, strict=True)):
        for band, suffix in ((None, ""), (4, "_in_band")):
            wanted = by_hand(observation, layer.layout, stride, band, ids)
            for place, name in enumerate(("max_logit", "quantile", "row_range")):
                torch.testing.assert_close(
                    getattr(found, name + suffix)[index], [row[place] for row in wanted], rtol=1e-5, atol=1e-6
                )


def test_passes_count_as_one():
    model = stack_of(MIXED)
    probe = AttentionProbe(model, None)
    x = torch.randn(4, 24, 48)
    with torch.no_grad(), probe.observing():
        model(x)
    whole = probe.reading()
    with torch.no_grad(), probe.observing():
        for part in x.split(1):
            model(part)
    torch.testing.assert_close(probe.reading().as_metrics(), whole.as_metrics())
    assert whole.max_logit_in_band is None


def test_probing_changes_no_bit_and_leaves_other_observers():
    model = stack_of(MIXED)
    x = torch.randn(2, 24, 48)
    plain = model(x)
    probe = AttentionProbe(model, 4)
    with recording(model) as seen, probe.observing():
        assert torch.equal(model(x), plain)
    assert len(seen) == 1
    assert not model.layers[0].is_observed


def test_a_logit_that_is_nan_is_told_from_none():
    model = stack_of(HeadLayout((None, None)))
    x = torch.randn(1, 8, 48)
    x[0, 3] = math.nan
    probe = AttentionProbe(model, 2, stride=1)
    with torch.no_grad(), probe.observing():
        model(x)
    found = probe.reading()
    assert math.isnan(found.max_logit[0][0]) and math.isnan(found.quantile[0][0])
    with torch.no_grad(), probe.observing():
        model(torch.randn(1, 8, 48), torch.full((1, 8), -1))
    assert probe.reading().max_logit == [[0.0, 0.0]]


def test_numbers_are_combined_over_processes():
    model = stack_of(MIXED)
    probe = AttentionProbe(model, 4)
    with torch.no_grad(), probe.observing():
        model(torch.randn(1, 16, 48))
    found = probe.reading(lambda x: x + 1, lambda x: x * 0)
    assert min(found.max_logit[0]) > 1 and min(found.row_range[0]) > 1
    assert found.quantile == [[0.0] * 6]


def test_bad_arguments_are_named():
    model = stack_of(MIXED)
    with pytest.raises(ValueError, match="band must be an integer >= 1, got 0"):
        AttentionProbe(model, 0)
    with pytest.raises(ValueError, match="stride must be an integer >= 1, got 0"):
        AttentionProbe(model, None, 0)
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear without"):
        AttentionProbe(torch.nn.Linear(2, 2), None)
    with pytest.raises(RuntimeError, match="no pass of the model was observed"):
        AttentionProbe(model, None).reading()
