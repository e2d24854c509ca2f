from itertools import chain

import pytest
from tests.bench.toy import metrics

from longshort.bench import prefill
from longshort.bench.model_providers import PROVIDERS, Provider
from longshort.bench.prefill import PrefillBenchmark, amdahl_bound, time_prefill
from longshort.bench.record import read_rows
from longshort.bench.sweep import measure
from longshort.layout import HeadLayout

SMALL = {"preset": "tiny", "lengths": (64, 32), "global_heads": 2, "window": 9, "rounds": 2}


def test_the_bound():
    """Half of 10 s is attention, a quarter of whose pairs stay."""
    assert amdahl_bound(10.0, 5.0, pairs=25, reference_pairs=100) == 6.25
    assert amdahl_bound(10.0, 5.0, pairs=100, reference_pairs=100) == 10


def test_metrics(tmp_path):
    out = tmp_path / "prefill.csv"
    shown: list[str] = []
    benchmark = PrefillBenchmark(**{**SMALL, "rounds": 3}, batch=2, threads=1, out=out)
    results = measure(benchmark, show=shown.append)
    assert not results.left_out
    found, slow = metrics(results), metrics(results, "p90")
    assert list(found) == [(length, name) for length in (32, 64) for name in PROVIDERS]
    for (length, provider), row in found.items():
        layouts = {
            "ls": [HeadLayout.split(4, 2, 9)] * 2,
            "hybrid": [HeadLayout((9,) * 4), HeadLayout((None,) * 4)],
            "mistral": [HeadLayout((9,) * 4)] * 2,
        }.get(provider, [HeadLayout((None,) * 4)] * 2)
        assert row["visible_pairs"] == 2 * sum(layout.score_count(length, length) for layout in layouts)
        assert row["tokens_per_second"] == pytest.approx(2 * length / row["milliseconds"] * 1e3, rel=1e-3)
        assert row["milliseconds"] <= slow[length, provider]["milliseconds"]
        for reference in ("mhsa", "gpt2"):
            assert (f"bound_{reference}" in row) == (provider in ("ls", "hybrid"))
            if provider == reference:
                assert row[f"speedup_over_{reference}"] == 1
    (columns,) = set(results.rows[["global_heads", "window", "layers", "threads"]].itertuples(index=False))
    assert columns == (4, 9, 2, 1)
    assert read_rows(out)["p50"].tolist() == results.rows["p50"].tolist()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    told = "\n".join(shown)
    assert "\n32 tokens, batch 2, float32, 1 thread" in told
    assert "  ls against mhsa: Amdahl's bound, at mhsa's own rate (longshort's kernels), is " in told
    assert "  hybrid against gpt2: Amdahl's bound, at gpt2's own rate (SDPA), is " in told


def test_metrics_follow_from_the_times(monkeypatch):
    """In each turn the whole model is timed, then one layer of each kind."""
    warm_up = [9.0] * 6
    rounds = [
        [0.30, 0.02, 0.80, 0.30, 0.50, 0.10],  # ls, its attention, mhsa's, gpt2's
        [0.20, 0.03, 0.40, 0.10, 0.60, 0.20],
        [0.40, 0.01, 1.00, 0.20, 0.80, 0.30],
    ]
    seconds = chain(warm_up, *rounds)
    monkeypatch.setattr(prefill, "wall_seconds", lambda _run, _device: next(seconds))
    settings = {**SMALL, "lengths": (64,), "rounds": 3}
    shown: list[str] = []
    results = measure(PrefillBenchmark(**settings, providers=("ls", "mhsa", "gpt2")), shown.append)
    ls, mhsa, gpt2 = metrics(results).values()
    assert (ls["milliseconds"], mhsa["milliseconds"], gpt2["milliseconds"]) == (300, 800, 600)
    assert metrics(results, "p90")[64, "ls"]["milliseconds"] == pytest.approx(380)
    assert ls["speedup_over_mhsa"] == 2.5  # of 8/3, 2 and 2.5
    assert ls["speedup_over_gpt2"] == 2  # of 5/3, 3 and 2
    assert gpt2["speedup_over_mhsa"] == 1.25  # of 1.6, 2/3 and 1.25
    assert ls["attention_milliseconds"] == 40  # 2 layers
    assert ls["attention_share"] == pytest.approx(2 * 0.02 / 0.3, rel=1e-4)

    left = ls["visible_pairs"] / mhsa["visible_pairs"]
    bounds = [total - 2 * attention * (1 - left) for _, _, total, attention, _, _ in rounds]
    allowed = sorted(1 - bound / one[2] for bound, one in zip(bounds, rounds, strict=True))[1]
    assert ls["bound_mhsa"] == pytest.approx(1e3 * sorted(bounds)[1], rel=1e-4)
    assert ls["saving_allowed_mhsa"] == pytest.approx(allowed, rel=1e-4)
    assert ls["saving_mhsa"] == pytest.approx(0.6)  # of 5/8, 1/2 and 3/5
    (told,) = (line for line in shown if "ls against mhsa" in line)
    assert told.endswith(
        f"is {1e3 * sorted(bounds)[1]:,.1f} ms, a saving of {allowed:.0%}; saved 60%, which is "
        f"{0.6 / allowed:.0%} of what the law allows"
    )
    bounds = [total - 2 * attention * (1 - left) for *_, total, attention in rounds]
    assert ls["bound_gpt2"] == pytest.approx(1e3 * sorted(bounds)[1], rel=1e-4)
    assert ls["saving_gpt2"] == pytest.approx(0.5)
    assert "bound_gpt2" not in mhsa
    assert "bound_mhsa" not in gpt2


def test_every_kind_of_layer_is_timed(monkeypatch):
    seconds = iter([9.0] * 3 + [0.5, 0.01, 0.2])
    monkeypatch.setattr(prefill, "wall_seconds", lambda _run, _device: next(seconds))
    settings = {**SMALL, "lengths": (64,), "rounds": 1, "layers": 4}
    (row,) = metrics(measure(PrefillBenchmark(**settings, providers=("hybrid",)))).values()
    assert row["attention_milliseconds"] == 2 * 10 + 2 * 200
    assert "speedup_over_mhsa" not in row


def test_what_was_left_out_is_shown():
    shown: list[str] = []
    results = measure(
        PrefillBenchmark(**{**SMALL, "global_heads": 1}, providers=("hybrid", "ls")), shown.append
    )
    assert set(results.rows["provider"]) == {"ls"}
    assert "  hybrid: 2 global heads in 2 layers do not make a whole number of layers" in "\n".join(shown)
    assert "(2 settings)" in shown[-1]


def test_times_by_length_and_provider(monkeypatch, tmp_path):
    seconds = iter([9.0] * 5 + [0.3, 0.02, 0.5, 0.01, 0.2, 0.4, 0.01, 0.6, 0.03, 0.1] + [1.0] * 15)
    monkeypatch.setattr(prefill, "wall_seconds", lambda _run, _device: next(seconds))
    shares: list[float] = []
    shape = tmp_path / "shape.json"
    shape.write_text('{"preset": "tiny", "num_global_heads": 2}')
    times = time_prefill(str(shape), (32, 64), ("mhsa", "hybrid"), rounds=2, report_progress=shares.append)
    pairs = 2 * HeadLayout((None,) * 4).score_count(32, 32)
    assert list(times) == [32, 64]
    assert times[32]["mhsa"].seconds == pytest.approx([0.3, 0.4])
    assert times[32]["mhsa"].attention_seconds == pytest.approx([0.04, 0.02])
    assert times[32]["mhsa"].pairs == pairs
    assert times[32]["hybrid"].seconds == pytest.approx([0.5, 0.6])
    assert times[32]["hybrid"].attention_seconds == pytest.approx([0.21, 0.13])  # one layer of each kind
    assert times[64]["hybrid"].seconds == [1, 1]
    assert shares[-1] == 1


def test_times_of_what_was_left_out_are_missed(monkeypatch):
    def fail(provider, *_args):
        raise RuntimeError(f"no memory for {provider.name}")

    monkeypatch.setattr(Provider, "build", fail)
    with pytest.raises(ValueError, match="no memory for mhsa"):
        time_prefill("tiny", (32,), ("mhsa",), rounds=1)
    build = Provider.attend
    monkeypatch.undo()

    def fail_one(provider, *args):
        return fail(provider) if provider.name == "mhsa" else build(provider, *args)

    monkeypatch.setattr(Provider, "attend", fail_one)
    with pytest.raises(RuntimeError, match=r"not all was measured: mhsa, 32 tokens, .*: failed: .* for mhsa"):
        time_prefill("tiny", (32,), ("ls", "mhsa"), rounds=1)
