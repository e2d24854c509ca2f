"""Which series of losses, gradient norms and logits are spikes, and which divergence."""

import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from longshort.stability import Spike, SpikeDetector, divergence_onset, divergence_step

Series = list[tuple[float, float, float | None]]


def healthy(steps: int, seed: int = 0) -> Series:
    """Loss falling from 5.5 to 2, noisy; a norm of heavy tails; logits that grow, measured every 10 steps."""
    noise = random.Random(seed)
    return [
        (
            2 + 3.5 * math.exp(-step / 80) + noise.gauss(0, 0.08),
            (0.5 + math.exp(-step / 30)) * noise.lognormvariate(0, 0.3),
            30 * (1 - math.exp(-step / 200)) if step % 10 == 0 else None,
        )
        for step in range(steps)
    ]


def spikes(series: Series, detector: SpikeDetector | None = None) -> list[Spike]:
    detector = detector or SpikeDetector()
    found = [detector.observe(step, *numbers) for step, numbers in enumerate(series, start=1)]
    return [spike for spike in found if spike is not None]


def changed(
    series: Series, step: int, until: int | None = None, **change: Callable[[float], float]
) -> Series:
    """The series with some numbers of the steps from `step` until `until` replaced."""
    names = ("loss", "norm", "logit")
    return [
        tuple(
            change[name](value) if name in change and value is not None else value
            for name, value in zip(names, numbers, strict=True)
        )
        if step <= at <= (until or step)
        else numbers
        for at, numbers in enumerate(series, start=1)
    ]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_gives_no_alarm(seed: int) -> None:
    assert spikes(healthy(2000, seed)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": lambda _: math.nan}, "loss not finite"),
        ({"norm": lambda _: math.inf}, "gradient norm not finite"),
        ({"logit": lambda _: math.nan}, "largest logit not finite"),
        ({"loss": lambda loss: loss + 1}, r"loss 2\.9\d+ above its median \d\.\d+"),
        ({"norm": lambda norm: 60 * norm}, r"gradient norm \d+(\.\d+)? above its median 0\.\d+"),
        ({"logit": lambda logit: 20 * logit}, r"largest logit 5\d\d above its median \d\d"),
        ({"logit": lambda logit: 1001.0}, "largest logit 1001 above 1000"),
    ],
    ids=["nan-loss", "inf-norm", "nan-logit", "loss", "norm", "logit", "logit-bound"],
)
def test_a_planted_spike_is_told_once_at_its_step(change: Any, reason: str) -> None:
    series = changed(healthy(900), 701, 705, **change)
    (spike,) = spikes(series)
    assert spike.step == spike.onset == 701
    (told,) = spike.reasons
    assert re.fullmatch(reason, told), told


def test_a_slow_rise_is_told_with_its_beginning() -> None:
    series = [
        (loss + 0.004 * max(0, step - 600), norm, logit)
        for step, (loss, norm, logit) in enumerate(healthy(900))
    ]
    (spike,) = spikes(series)
    assert spike.reasons == ("running loss 0.5 nats above its minimum for 20 steps",)
    assert 720 < spike.step < 800
    assert spike.onset == spike.step - 19


def test_signs_that_come_together_are_one_spike() -> None:
    (spike,) = spikes(changed(healthy(900), 701, loss=lambda loss: loss + 2, norm=lambda norm: 50 * norm))
    assert len(spike.reasons) == 2


def test_a_spike_that_comes_back_after_a_calm_is_another() -> None:
    series = healthy(900)
    for step in (700, 720, 800):
        series = changed(series, step, loss=lambda loss: loss + 1)
    assert [spike.step for spike in spikes(series)] == [700, 800]


def test_a_calm_is_counted_in_steps_where_few_of_them_measure_logits() -> None:
    series = healthy(900)
    for step in (701, 731, 791):
        series = changed(series, step, logit=lambda _: 1001.0)
    assert [spike.step for spike in spikes(series)] == [701, 791]


def test_a_diverged_run_is_told_and_then_left_alone() -> None:
    series = changed(healthy(900), 701, 900, loss=lambda _: math.nan, norm=lambda _: math.nan)
    assert [spike.step for spike in spikes(series)] == [701]


def test_thresholds_are_fields() -> None:
    series = changed(healthy(900), 701, loss=lambda loss: loss + 1)
    assert spikes(series, SpikeDetector(loss_margin=1.5)) == []
    assert spikes(series, SpikeDetector(loss_score=20.0)) == []
    assert len(spikes(healthy(900), SpikeDetector(logit_bound=20.0))) == 1


def test_an_early_spike_waits_for_half_a_window() -> None:
    early = changed(healthy(200), 5, loss=lambda loss: loss + 3)
    assert spikes(early, SpikeDetector(window=20)) == []
    later = changed(healthy(200), 11, loss=lambda loss: loss + 3)
    assert [spike.step for spike in spikes(later, SpikeDetector(window=20, loss_score=3))] == [11]


@pytest.mark.parametrize("step", [0, 3, 300, 703, 712])
def test_a_restored_detector_goes_on_as_if_nothing_had_happened(step: int) -> None:
    series = changed(healthy(900), 701, 800, loss=lambda loss: loss + 1, norm=lambda norm: 20 * norm)
    whole, first, second = SpikeDetector(), SpikeDetector(), SpikeDetector()
    for at, numbers in enumerate(series, start=1):
        expected = whole.observe(at, *numbers)
        if at == step + 1:
            spikes(healthy(50), second)  # is forgotten
            second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert (first if at <= step else second).observe(at, *numbers) == expected
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("field", "value"),
    [("window", 0), ("rise_steps", 1.5), ("loss_score", 0.0), ("rise", math.nan), ("logit_bound", -1)],
)
def test_bad_thresholds_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        SpikeDetector(**{field: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_is_divergence(bad: float | None) -> None:
    assert divergence_step([3.0, 2.0, bad, 2.0]) == 3


def test_divergence_is_a_running_loss_above_its_minimum_for_100_steps() -> None:
    flat = [2.0] * 100
    assert divergence_step([]) is None
    assert divergence_step(flat + [2.49] * 1000) is None
    # The mean of 50 steps is 0.5 above from the 25th step at 3.0 on, so for 100 steps 99 steps later.
    assert divergence_step(flat + [3.0] * 300) == 100 + 25 + 99
    assert divergence_step(flat + [3.0] * 123) is None
    assert divergence_step(flat + [3.0] * 90 + [2.0] * 200) is None
    assert divergence_step([9.0] * 49 + flat + [3.0] * 300) == 49 + 224  # no mean before 50 losses


def test_a_falling_loss_and_a_healthy_one_have_not_diverged() -> None:
    assert divergence_step([loss for loss, _, _ in healthy(3000)]) is None
    assert divergence_step(iter([100.0 / (1 + step) for step in range(1000)])) is None


@pytest.mark.parametrize("rest", [[3.0] * 300, [3.0] * 60 + [math.nan], [3.0] * 60 + [None]])
def test_a_divergence_begins_where_the_running_loss_is_too_high(rest: list[float | None]) -> None:
    losses = [2.0] * 100 + rest
    assert divergence_onset(losses) == 125  # where the mean of 50 steps is 0.5 above
    assert divergence_onset(losses, margin=0.02) == 101
    assert divergence_onset(losses[:150]) is None


def test_a_loss_that_is_not_finite_begins_there_if_all_was_well() -> None:
    assert divergence_onset([2.0] * 100 + [math.inf] + [2.0] * 9) == 101
    assert divergence_onset([math.nan]) == 1
    assert divergence_onset([2.0] * 100 + [3.0] * 60 + [2.0] * 200 + [None]) == 361
