from itertools import chain

import pytest
from tests.bench.toy import metrics

from longshort.bench import decode
from longshort.bench.decode import DecodeBenchmark
from longshort.bench.model_providers import PROVIDERS
from longshort.bench.sweep import measure
from longshort.model import kv_bytes, preset

SMALL = {"preset": "tiny", "lengths": (64,), "global_heads": 2, "window": 9, "rounds": 2, "tokens": 3}


def test_metrics(tmp_path):
    out = tmp_path / "decode.csv"
    benchmark = DecodeBenchmark(
        **{**SMALL, "rounds": 3, "lengths": (32, 64)}, batch=2, dtype="bfloat16", out=out
    )
    results = measure(benchmark)
    assert not results.left_out
    found, slow = metrics(results), metrics(results, "p90")
    assert list(found) == [(length, name) for length in (32, 64) for name in PROVIDERS]
    for (length, provider), row in found.items():
        mhsa = found[length, "mhsa"]
        ours = provider in ("ls", "mhsa", "hybrid")
        assert row["milliseconds"] <= slow[length, provider]["milliseconds"]
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["milliseconds"], rel=1e-3)
        rate = row["bytes_read"] / row["milliseconds"] / 1e6
        assert row["gigabytes_per_second"] == pytest.approx(rate, rel=1e-3)
        assert row["floor_ratio"] == pytest.approx(mhsa["bytes_read"] / row["bytes_read"], rel=1e-3)
        assert ("attention_microseconds" in row) == ours
        assert ("attention_speedup_over_mhsa" in row) == ours
        assert "speedup_over_gpt2" in row
        assert row["bytes_read"] < 2 * row["parameters"] + row["cache_bytes"]
    assert found[64, "mhsa"]["speedup_over_mhsa"] == found[64, "mhsa"]["floor_ratio"] == 1
    config = preset("tiny", num_global_heads=2, local_window=9)
    ls = found[64, "ls"]
    assert ls["cache_bytes"] == 2 * kv_bytes(config, 64, benchmark.torch_dtype)
    assert found[64, "gpt2"]["cache_bytes"] == found[64, "mhsa"]["cache_bytes"] > ls["cache_bytes"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_metrics_follow_from_the_times(monkeypatch):
    """A turn times 2 steps, then, for our own caches, the attention of both layers at once."""
    warm_up = [9.0] * 8
    rounds = [
        [0.01, 0.03, 0.002, 0.02, 0.02, 0.004, 0.05, 0.07],  # ls, mhsa, gpt2
        [0.02, 0.04, 0.001, 0.08, 0.10, 0.008, 0.06, 0.12],
    ]
    seconds = chain(warm_up, *rounds)
    monkeypatch.setattr(decode, "wall_seconds", lambda _run, _device: next(seconds))
    results = measure(DecodeBenchmark(**{**SMALL, "tokens": 2}, providers=("ls", "mhsa", "gpt2")))
    ls, mhsa, gpt2 = metrics(results).values()
    assert ls["milliseconds"] == 25
    assert metrics(results, "p90")[64, "ls"]["milliseconds"] == pytest.approx(37)  # of all steps
    assert ls["speedup_over_mhsa"] == 2  # of 1 and 3
    assert ls["speedup_over_gpt2"] == 3
    assert mhsa["speedup_over_gpt2"] == pytest.approx(2)  # of 3 and 1
    assert ls["attention_microseconds"] == 750
    assert ls["attention_speedup_over_mhsa"] == 5  # of 2 and 8
    assert "attention_microseconds" not in gpt2


def test_the_context_grows_by_what_is_decoded(monkeypatch):
    """Steps and attention alone reach every token, and the positions last."""
    lengths = []
    timed = decode.wall_seconds

    def spy(run, device):
        seconds = timed(run, device)
        if hasattr(run, "keywords"):
            lengths.append(run.keywords["past_key_values"].get_seq_length())
        return seconds

    monkeypatch.setattr(decode, "wall_seconds", spy)
    benchmark = DecodeBenchmark(**SMALL, providers=("ls",))
    measure(benchmark)
    assert lengths == [65, 66, 67, 69, 70, 71, 73, 74, 75]
    assert benchmark.config().max_position_embeddings == 64 + 12
