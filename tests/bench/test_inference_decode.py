import csv
import weakref
from dataclasses import fields
from itertools import chain

import pytest

from longshort.bench import inference_decode
from longshort.bench.inference_decode import DecodeRow, measure_decode
from longshort.bench.inference_providers import PROVIDERS, Provider
from longshort.bench.inference_settings import DecodeSettings
from longshort.model import kv_bytes, preset

SMALL = {"preset": "tiny", "lengths": (64,), "global_heads": 2, "window": 9, "rounds": 2, "tokens": 3}


def test_rows_and_columns(tmp_path):
    out = tmp_path / "decode.csv"
    settings = DecodeSettings(**{**SMALL, "lengths": (32, 64)}, batch=2, dtype="bfloat16", out=out)
    results = measure_decode(settings)
    assert not results.skipped
    assert [(row.length, row.provider) for row in results.rows] == [
        (length, name) for length in (32, 64) for name in PROVIDERS
    ]
    by_name = {(row.length, row.provider): row for row in results.rows}
    for row in results.rows:
        mhsa = by_name[row.length, "mhsa"]
        ours = row.provider in ("ls", "mhsa", "hybrid")
        assert row.milliseconds <= row.milliseconds_p90
        assert row.tokens_per_second == pytest.approx(2e3 / row.milliseconds, rel=1e-3)
        assert row.gigabytes_per_second == pytest.approx(row.bytes_read / row.milliseconds / 1e6, rel=1e-3)
        assert row.floor_ratio == pytest.approx(mhsa.bytes_read / row.bytes_read, rel=1e-3)
        assert (row.attention_microseconds is not None) == ours
        assert (row.attention_speedup_over_mhsa is not None) == ours
        assert row.speedup_over_gpt2 is not None
        assert row.bytes_read < 2 * row.parameters + row.cache_bytes
    assert by_name[64, "mhsa"].speedup_over_mhsa == by_name[64, "mhsa"].floor_ratio == 1
    config = preset("tiny", num_global_heads=2, local_window=9)
    ls = by_name[64, "ls"]
    assert ls.cache_bytes == 2 * kv_bytes(config, 64, settings.torch_dtype)
    assert by_name[64, "gpt2"].cache_bytes == by_name[64, "mhsa"].cache_bytes > ls.cache_bytes

    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == [field.name for field in fields(DecodeRow)]
    assert [line["provider"] for line in lines] == [row.provider for row in results.rows]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_columns_follow_from_the_times(monkeypatch):
    """A turn times 2 steps, then, for our own caches, the attention of both layers at once."""
    warm_up = [9.0] * 8
    rounds = [
        [0.01, 0.03, 0.002, 0.02, 0.02, 0.004, 0.05, 0.07],  # ls, mhsa, gpt2
        [0.02, 0.04, 0.001, 0.08, 0.10, 0.008, 0.06, 0.12],
    ]
    seconds = chain(warm_up, *rounds)
    monkeypatch.setattr(inference_decode, "wall_seconds", lambda _run, _device: next(seconds))
    settings = DecodeSettings(**{**SMALL, "tokens": 2}, providers=("ls", "mhsa", "gpt2"))
    ls, mhsa, gpt2 = measure_decode(settings).rows
    assert ls.milliseconds == 25
    assert ls.milliseconds_p90 == pytest.approx(37)
    assert ls.speedup_over_mhsa == 2  # of 1 and 3
    assert ls.speedup_over_gpt2 == 3
    assert mhsa.speedup_over_gpt2 == pytest.approx(2)  # of 3 and 1
    assert ls.attention_microseconds == 750
    assert ls.attention_speedup_over_mhsa == 5  # of 2 and 8
    assert gpt2.attention_microseconds is None


def test_the_context_grows_by_what_is_decoded(monkeypatch):
    """Steps and attention alone reach every token, and the positions last."""
    lengths = []
    timed = inference_decode.wall_seconds

    def spy(run, device):
        seconds = timed(run, device)
        if hasattr(run, "keywords"):
            lengths.append(run.keywords["past_key_values"].get_seq_length())
        return seconds

    monkeypatch.setattr(inference_decode, "wall_seconds", spy)
    settings = DecodeSettings(**SMALL, providers=("ls",))
    measure_decode(settings)
    assert lengths == [65, 66, 67, 69, 70, 71, 73, 74, 75]
    assert settings.config(settings.room).max_position_embeddings == 64 + 12


def test_models_that_do_not_fit_together_are_measured_apart():
    alone = measure_decode(DecodeSettings(**SMALL, providers=("gpt2", "ls", "mhsa")))
    sizes = {row.provider: 4 * row.parameters + row.cache_bytes for row in alone.rows}
    limit = (sizes["ls"] + sizes["mhsa"]) / 2**30 * 1.001
    settings = DecodeSettings(**SMALL, providers=("gpt2", "ls", "mhsa"), max_memory_gib=limit)
    rows = {row.provider: row for row in measure_decode(settings).rows}
    assert list(rows) == ["ls", "mhsa", "gpt2"]
    assert rows["ls"].speedup_over_mhsa is not None
    assert rows["ls"].speedup_over_gpt2 is None
    assert rows["gpt2"].speedup_over_mhsa is None
    assert rows["gpt2"].floor_ratio == pytest.approx(
        rows["mhsa"].bytes_read / rows["gpt2"].bytes_read, rel=1e-3
    )


def test_one_group_is_gone_when_the_next_is_built(monkeypatch):
    alive: dict[str, list[str]] = {}
    models: dict[str, weakref.ref] = {}
    build = Provider.build

    def spy(provider, device, dtype):
        alive[provider.name] = [name for name, model in models.items() if model() is not None]
        model = build(provider, device, dtype)
        models[provider.name] = weakref.ref(model)
        return model

    monkeypatch.setattr(Provider, "build", spy)
    monkeypatch.setattr(inference_decode, "groups_in_memory", lambda *_: [["gpt2"], ["ls"]])
    measure_decode(DecodeSettings(**SMALL, providers=("gpt2", "ls")))
    assert alive == {"gpt2": [], "ls": []}


@pytest.mark.parametrize("part", ["build", "filled_cache"])
def test_a_provider_that_fails_before_its_turn_is_told(monkeypatch, part):
    method = getattr(Provider, part)

    def fail(provider, *args, **options):
        if provider.name == "mhsa":
            raise RuntimeError("no memory left")
        return method(provider, *args, **options)

    monkeypatch.setattr(Provider, part, fail)
    results = measure_decode(DecodeSettings(**SMALL, providers=("ls", "mhsa", "gpt2")))
    assert {row.provider for row in results.rows} == {"ls", "gpt2"}
    assert {(remark.provider, remark.text) for remark in results.skipped} == {
        ("mhsa", "failed: RuntimeError: no memory left")
    }


def test_inputs_that_fail_are_told_of_every_provider(monkeypatch):
    def fail(*_args):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(inference_decode, "_inputs", fail)
    with pytest.raises(ValueError, match="nothing was measured: failed: RuntimeError: no memory left"):
        measure_decode(DecodeSettings(**SMALL))
