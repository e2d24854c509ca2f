from typing import Any

import pytest
from tests.bench.toy import metrics

from longshort.bench import monitor, projection
from longshort.bench.monitor import MonitorBenchmark
from longshort.bench.projection import ProjectionBenchmark
from longshort.bench.sweep import measure
from longshort.stability import AttentionMonitor


def test_the_cost_of_the_monitor(monkeypatch):
    seconds = iter([9.0, 9.0, 1.0, 1.5, 2.0, 2.4, 4.0, 5.2] * 2)
    readings: list[float] = []
    reading = AttentionMonitor.reading

    def spy(watched):
        found = reading(watched)
        readings.append(found.max_logit)
        return found

    def timed(run, _threads):
        run()
        return next(seconds)

    monkeypatch.setattr(AttentionMonitor, "reading", spy)
    monkeypatch.setattr(monitor, "quiet_seconds", timed)
    benchmark = MonitorBenchmark(lengths=(32,), batch=2, rounds=3, every=5, precision="bf16")
    results = measure(benchmark)
    assert not results.left_out
    assert len(readings) == 2 * 4  # a monitored step of each model and round
    assert all(value > 0 for value in readings)
    assert list(results.rows["model"].unique()) == ["LS-attention", "MHSA"]
    for _, rows in results.rows.groupby("model"):
        found: dict[Any, float] = rows.set_index(["provider", "metric"])["p50"].to_dict()
        assert found["plain", "milliseconds"] == 2000
        assert found["monitored", "milliseconds"] == 2400
        assert found["plain", "extra"] == 0
        assert found["monitored", "extra"] == pytest.approx(0.3)  # of 0.5, 0.2 and 0.3
        assert found["monitored", "extra_per_step"] == pytest.approx(0.06)


def test_projections_take_turns_over_all_matrices(monkeypatch):
    seconds = iter([9.0, 9.0, 4.0, 2.0, 6.0, 2.0, 8.0, 2.0])
    called: list[int] = []

    def timed(run):
        run()
        return next(seconds)

    def project(linear, x):
        called.append(linear.weight.numel())
        return linear(x)

    monkeypatch.setattr(projection, "_LAYERS", 1)
    monkeypatch.setattr(projection, "project", project)
    monkeypatch.setattr(projection, "wall_seconds", timed)
    found = metrics(measure(ProjectionBenchmark(tokens=(2,), rounds=3, threads=1)))
    linear, ours = found[2, "linear"], found[2, "projection"]
    weights = 768 * (2304 + 768 + 3072 + 3072)
    assert sum(called) == 4 * weights  # in each round
    assert (linear["milliseconds"], ours["milliseconds"]) == (6000, 2000)
    assert (linear["speedup"], ours["speedup"]) == (1, 3)
    assert ours["gigabytes_per_second"] == pytest.approx(4 * weights / 2e9, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (MonitorBenchmark, {"every": 0}, "--every must be an integer >= 1, got 0"),
        (MonitorBenchmark, {"precision": "fp8"}, "--precision must be one of fp32, bf16, got 'fp8'"),
        (MonitorBenchmark, {"preset": "huge"}, "preset must be one of tiny, .*, got 'huge'"),
        (ProjectionBenchmark, {"tokens": (0,)}, "--tokens must be an integer >= 1, got 0"),
        (ProjectionBenchmark, {"tokens": ()}, "--tokens must name at least one, got none"),
        (ProjectionBenchmark, {"providers": ("warp",)}, "--providers must be among linear, projection"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)
