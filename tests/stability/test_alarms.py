"""Scores of alarms on planted measurements, and the spectral entropy of updates against plain matrices."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longshort.layers import LongShortAttention
from longshort.layout import HeadLayout
from longshort.stability import ALARMS, AttentionMonitor, SpikeDetector, UpdateEntropy
from longshort.stability.alarms import ALARM_MEASUREMENTS, EntropyFall, RowRangeSlope, alarm_score


def test_the_slope_is_that_of_the_fastest_head_per_step() -> None:
    score = RowRangeSlope()
    steps = [1, *range(10, 200, 10)]
    found = [score.add(step, [[2.0, 3 * math.exp(0.01 * step)], [50.0, 40.0 - 0.1 * step]]) for step in steps]
    assert found[:9] == [None] * 9
    assert found[9:] == pytest.approx([0.01] * 11)


def test_row_ranges_below_1_count_as_1() -> None:
    score = RowRangeSlope()
    found = [score.add(step, [[0.01 * math.exp(0.1 * step)]]) for step in range(40)]
    assert found[9:] == pytest.approx([0.0] * 31)


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_a_head_that_is_not_measured_has_no_slope_while_that_is_in_view(unknown: float | None) -> None:
    score = RowRangeSlope()
    rows = [[[math.exp(0.02 * step) if step != 5 else unknown, math.exp(0.01 * step)]] for step in range(30)]
    found = [score.add(step, row) for step, row in enumerate(rows)]
    assert found[9:15] == pytest.approx([0.01] * 6)
    assert found[15:] == pytest.approx([0.02] * 15)
    assert RowRangeSlope().add(1, [[unknown]]) is None


def test_the_fall_is_relative_to_each_heads_own_maximum() -> None:
    score = EntropyFall()
    assert score.add(1, [[2.0, 4.0]]) == 0.0
    assert score.add(2, [[1.0, 4.0]]) == 0.5
    assert score.add(3, [[3.0, 3.0]]) == 0.25
    assert score.add(4, [[None, math.nan]]) is None
    assert score.add(5, [[3.0, 0.0]]) == 1.0


def test_a_head_without_entropy_so_far_has_no_fall() -> None:
    score = EntropyFall()
    assert score.add(1, [[0.0, None]]) is None
    assert score.add(2, [[0.0, 2.0]]) == 0.0
    assert score.add(3, [[1.0, 1.0]]) == 0.5


@pytest.mark.parametrize("alarm", ALARMS)
@pytest.mark.parametrize("at", [0, 3, 12, 25])
def test_a_restored_score_goes_on_as_if_nothing_had_happened(alarm: Any, at: int) -> None:
    whole, first, second = alarm_score(alarm), alarm_score(alarm), alarm_score(alarm)
    second.add(1, [[7.0, 7.0, 7.0]])  # is forgotten
    for step in range(1, 30):
        row = [[2 + math.sin(step), 3 + math.cos(2 * step), None if step == 11 else 1.5]]
        if step == at + 1:
            second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert (first if step <= at else second).add(step, row) == whole.add(step, row)
    assert second.state() == whole.state()


def test_an_unknown_alarm_is_named() -> None:
    with pytest.raises(ValueError, match="alarm must be one of row-range, entropy, update, got 'loss'"):
        alarm_score("loss")  # pyright: ignore[reportArgumentType]


LAYOUTS = {
    "mixed": HeadLayout((4, None)),
    "gqa": HeadLayout((4, 4, 4, None, None, None), num_kv_heads=2),
}


class Layers(nn.Module):
    """Two layers side by side."""

    def __init__(self, embed_dim: int, layout: HeadLayout) -> None:
        super().__init__()
        self.first, self.second = (LongShortAttention(embed_dim, layout, head_dim=4) for _ in range(2))

    def products(self) -> list[list[Tensor]]:
        """W_Qᵀ·W_K of each layer and query head, in float64."""
        return [_products(layer) for layer in (self.first, self.second)]


def _products(layer: LongShortAttention) -> list[Tensor]:
    rows = layer.qkv_proj.weight.detach().double().unflatten(0, (-1, layer.head_dim))
    heads, group_size = layer.layout.num_heads, layer.layout.group_size
    return [rows[head].T @ rows[heads + head // group_size] for head in range(heads)]


def model_of(layout: HeadLayout, embed_dim: int = 24) -> Layers:
    torch.manual_seed(0)
    return Layers(embed_dim, layout)


def exact(before: list[Tensor], after: list[Tensor]) -> list[float]:
    entropies = []
    for old, new in zip(before, after, strict=True):
        shares = torch.linalg.svdvals(new - old)
        shares = shares / shares.sum()
        entropies.append(torch.special.entr(shares).sum().item())
    return entropies


@torch.no_grad()
def move(model: nn.Module, size: float) -> None:
    for parameter in model.parameters():
        parameter += size * torch.randn_like(parameter)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("embed_dim", [24, 6], ids=["thin", "wide"])  # beside 2·head_dim = 8
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_entropy_is_that_of_the_plain_products(layout: HeadLayout, embed_dim: int, size: float) -> None:
    model = model_of(layout, embed_dim=embed_dim)
    measured = UpdateEntropy(model)
    for _ in range(2):
        before = model.products()
        move(model, size)
        for entropies, old, new in zip(measured.measure(), before, model.products(), strict=True):
            assert entropies == pytest.approx(exact(old, new), rel=1e-6, abs=1e-6)
            assert all(0 < entropy <= math.log(8) for entropy in entropies)


def test_an_update_of_rank_1_has_no_entropy_and_scales_do_not_count() -> None:
    model = model_of(LAYOUTS["mixed"])
    measured = UpdateEntropy(model)
    with torch.no_grad():
        model.first.qkv_proj.weight[0] += 1.0  # a row of the first head's queries
        model.first.qkv_proj.weight[4:8] *= 2  # all queries of the second
    first, second = measured.measure()[0]
    assert first == pytest.approx(0.0, abs=1e-9)
    product = model.products()[0][1]
    assert second == pytest.approx(exact([product], [2 * product])[0])


def test_weights_that_do_not_change_or_are_not_finite_have_no_entropy() -> None:
    model = model_of(LAYOUTS["gqa"])
    measured = UpdateEntropy(model)
    assert all(math.isnan(entropy) for layer in measured.measure() for entropy in layer)
    move(model, 1.0)
    with torch.no_grad():
        model.first.qkv_proj.weight[0, 0] = math.nan  # the first query head's
        model.first.qkv_proj.weight[7 * 4, 3] = math.inf  # the second key head's, of heads 3, 4 and 5
    first, second = measured.measure()
    assert [math.isnan(entropy) for entropy in first] == [True, False, False, True, True, True]
    assert not any(math.isnan(entropy) for entropy in second)


def test_a_restored_measurement_counts_from_the_weights_of_the_one_before() -> None:
    model, other = model_of(LAYOUTS["gqa"]), model_of(LAYOUTS["gqa"])
    measured = UpdateEntropy(model)
    move(model, 0.1)
    measured.measure()
    state = {name: weights.clone() for name, weights in measured.state().items()}
    move(model, 0.1)
    other.load_state_dict(model.state_dict())
    restored = UpdateEntropy(other)
    restored.restore(state)
    assert restored.measure() == measured.measure()


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear without"):
        UpdateEntropy(nn.Linear(2, 2))


def test_a_monitor_measures_what_alarms_need_where_asked_to() -> None:
    model = model_of(LAYOUTS["gqa"])
    plain = AttentionMonitor(model, None)
    whole = AttentionMonitor(model, None, row_range=True, update_entropy=UpdateEntropy(model))
    with plain.observing(), whole.observing():
        for layer in (model.first, model.second):
            layer(torch.randn(2, 9, 24))
    move(model, 0.1)
    reading, alarmed = plain.reading(), whole.reading()
    assert reading.row_range_by_head is reading.update_entropy_by_head is None
    assert alarmed.row_range_by_head is not None
    assert max(value for layer in alarmed.row_range_by_head for value in layer) == alarmed.row_range
    metrics = alarmed.as_metrics()
    assert all(torch.tensor(metrics[name]).shape == (2, 6) for name in ALARM_MEASUREMENTS.values())
    assert not {"row_range_by_head", "update_entropy_by_head"} & reading.as_metrics().keys()


PLANTED: dict[Any, tuple[list[float], str]] = {
    "row-range": (
        [4.0] * 20 + [4 * math.exp(0.2 * 10 * step) for step in range(20)],
        r"slope of the log row range of a head 0\.1\d* a step above 0.1",
    ),
    "entropy": ([3.0] * 20 + [0.1] * 20, r"fall of the entropy of a head 0\.967 above 0\.9"),
    "update": ([2.0] * 20 + [0.1] * 20, r"fall of the spectral entropy of a head's update 0\.95 above 0\.9"),
}


def watch(alarm: Any, values: list[float], first: int = 0, detector: SpikeDetector | None = None) -> list:
    """Measured every 10 steps."""
    detector = detector or SpikeDetector(alarm=alarm)
    found = []
    for step in range(10 * first + 1, 10 * len(values) + 1):
        by_head = [[1.0, 1.0], [1.0, values[step // 10 - 1]]] if step % 10 == 0 else None
        found.append(detector.observe(step, 2.0, 1.0, None, by_head))
    return [spike for spike in found if spike is not None]


@pytest.mark.parametrize("alarm", ALARMS)
def test_a_planted_alarm_is_a_sign_of_a_spike_told_once(alarm: Any) -> None:
    values, reason = PLANTED[alarm]
    (spike,) = watch(alarm, values)
    assert 200 < spike.step <= 260 and spike.onset == spike.step
    (told,) = spike.reasons
    assert re.fullmatch(reason, told), told
    assert watch(None, values, detector=SpikeDetector()) == []
    assert watch(alarm, values, detector=SpikeDetector(alarm=alarm, alarm_bound=5.0)) == []


@pytest.mark.parametrize("alarm", ALARMS)
@pytest.mark.parametrize("at", [5, 21, 30])
def test_a_detector_with_an_alarm_is_restored(alarm: Any, at: int) -> None:
    values, _ = PLANTED[alarm]
    first, second = SpikeDetector(alarm=alarm), SpikeDetector(alarm=alarm)
    found = watch(alarm, values[:at], detector=first)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert found + watch(alarm, values, first=at, detector=second) == watch(alarm, values)


def test_bad_settings_of_a_detector_are_named() -> None:
    with pytest.raises(ValueError, match="alarm must be one of"):
        SpikeDetector(alarm="loss")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="alarm_bound must be"):
        SpikeDetector(alarm="entropy", alarm_bound=0.0)
