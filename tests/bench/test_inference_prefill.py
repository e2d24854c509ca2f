import csv
import weakref
from dataclasses import fields
from itertools import chain

import pytest
import torch

from longshort.bench import inference_prefill
from longshort.bench.inference_prefill import PrefillRow, amdahl_bound, measure_prefill
from longshort.bench.inference_providers import PROVIDERS, Provider
from longshort.bench.inference_settings import PrefillSettings
from longshort.layout import HeadLayout

SMALL = {"preset": "tiny", "lengths": (64, 32), "global_heads": 2, "window": 9, "rounds": 2}


def test_the_bound():
    """Half of 10 s is attention, a quarter of whose pairs stay."""
    assert amdahl_bound(10.0, 5.0, pairs=25, reference_pairs=100) == 6.25
    assert amdahl_bound(10.0, 5.0, pairs=100, reference_pairs=100) == 10


def test_rows_and_columns(tmp_path):
    out = tmp_path / "prefill.csv"
    threads = torch.get_num_threads()
    shown: list[str] = []
    settings = PrefillSettings(**SMALL, batch=2, threads=1, out=out)
    results = measure_prefill(settings, show=shown.append)
    assert torch.get_num_threads() == threads
    assert not results.skipped
    assert [(row.length, row.provider) for row in results.rows] == [
        (length, name) for length in (32, 64) for name in PROVIDERS
    ]
    for row in results.rows:
        layouts = {
            "ls": [HeadLayout.split(4, 2, 9)] * 2,
            "hybrid": [HeadLayout((9,) * 4), HeadLayout((None,) * 4)],
            "mistral": [HeadLayout((9,) * 4)] * 2,
        }.get(row.provider, [HeadLayout((None,) * 4)] * 2)
        assert row.visible_pairs == 2 * sum(layout.score_count(row.length, row.length) for layout in layouts)
        assert row.tokens_per_second == pytest.approx(2 * row.length / row.milliseconds * 1e3, rel=1e-3)
        assert row.milliseconds <= row.milliseconds_p90
        assert (row.global_heads, row.window, row.layers, row.threads) == (4, 9, 2, 1)
        for reference in ("mhsa", "gpt2"):
            assert (getattr(row, f"bound_{reference}") is None) == (row.provider not in ("ls", "hybrid"))
            if row.provider == reference:
                assert getattr(row, f"speedup_over_{reference}") == 1

    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == [field.name for field in fields(PrefillRow)]
    assert [float(line["milliseconds"]) for line in lines] == [row.milliseconds for row in results.rows]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefill.csv", "prefill.png"]
    told = "\n".join(shown)
    assert "\n32 tokens, batch 2, float32, 1 thread" in told
    assert "  ls against mhsa: Amdahl's bound, at mhsa's own rate (longshort's kernels), is " in told
    assert "  hybrid against gpt2: Amdahl's bound, at gpt2's own rate (SDPA), is " in told


def test_the_columns_follow_from_the_times(monkeypatch):
    """In each turn the whole model is timed, then one layer of each kind."""
    warm_up = [9.0] * 6
    rounds = [
        [0.30, 0.02, 0.80, 0.30, 0.50, 0.10],  # ls, its attention, mhsa's, gpt2's
        [0.20, 0.03, 0.40, 0.10, 0.60, 0.20],
        [0.40, 0.01, 1.00, 0.20, 0.80, 0.30],
    ]
    seconds = chain(warm_up, *rounds)
    monkeypatch.setattr(inference_prefill, "wall_seconds", lambda _run, _device: next(seconds))
    settings = PrefillSettings(**{**SMALL, "lengths": (64,), "rounds": 3}, providers=("ls", "mhsa", "gpt2"))
    ls, mhsa, gpt2 = measure_prefill(settings).rows
    assert (ls.milliseconds, mhsa.milliseconds, gpt2.milliseconds) == (300, 800, 600)
    assert ls.milliseconds_p90 == pytest.approx(380)
    assert ls.speedup_over_mhsa == 2.5  # of 8/3, 2 and 2.5
    assert ls.speedup_over_gpt2 == 2  # of 5/3, 3 and 2
    assert gpt2.speedup_over_mhsa == 1.25  # of 1.6, 2/3 and 1.25
    assert ls.attention_milliseconds == 40  # 2 layers
    assert ls.attention_share == pytest.approx(2 * 0.02 / 0.3, rel=1e-4)

    left = ls.visible_pairs / mhsa.visible_pairs
    bounds = [total - 2 * attention * (1 - left) for _, _, total, attention, _, _ in rounds]
    allowed = sorted(1 - bound / one[2] for bound, one in zip(bounds, rounds, strict=True))[1]
    assert ls.bound_mhsa == pytest.approx(1e3 * sorted(bounds)[1], rel=1e-4)
    assert ls.saving_allowed_mhsa == pytest.approx(allowed, rel=1e-4)
    assert ls.saving_mhsa == pytest.approx(0.6)  # of 5/8, 1/2 and 3/5
    assert ls.share_of_allowed_mhsa == pytest.approx(0.6 / allowed, rel=1e-4)
    bounds = [total - 2 * attention * (1 - left) for *_, total, attention in rounds]
    assert ls.bound_gpt2 == pytest.approx(1e3 * sorted(bounds)[1], rel=1e-4)
    assert ls.saving_gpt2 == pytest.approx(0.5)
    assert mhsa.bound_gpt2 is None
    assert gpt2.bound_mhsa is None


def test_the_hybrid_has_two_kinds_of_layers(monkeypatch):
    seconds = iter([9.0] * 3 + [0.5, 0.01, 0.2])
    monkeypatch.setattr(inference_prefill, "wall_seconds", lambda _run, _device: next(seconds))
    settings = PrefillSettings(**{**SMALL, "lengths": (64,), "rounds": 1, "layers": 4}, providers=("hybrid",))
    (row,) = measure_prefill(settings).rows
    assert row.attention_milliseconds == 2 * 10 + 2 * 200
    assert row.speedup_over_mhsa is None


def test_what_was_left_out_is_told():
    shown: list[str] = []
    settings = PrefillSettings(**{**SMALL, "global_heads": 1}, providers=("hybrid", "ls"))
    results = measure_prefill(settings, show=shown.append)
    assert {row.provider for row in results.rows} == {"ls"}
    assert "  hybrid: 2 global heads in 2 layers are no whole number of layers" in "\n".join(shown)
    assert "(2 settings)" in shown[-1]


def test_nothing_measured_leaves_nothing(tmp_path):
    settings = PrefillSettings(**SMALL, max_memory_gib=1e-6, out=tmp_path / "prefill.csv")
    with pytest.raises(ValueError, match=r"nothing was measured: takes about .* GiB"):
        measure_prefill(settings)
    assert not list(tmp_path.iterdir())


def test_files_are_not_overwritten_unasked(tmp_path):
    old = tmp_path / "prefill.png"
    old.write_text("precious")
    with pytest.raises(FileExistsError, match=r"prefill\.png exists; --overwrite replaces it"):
        measure_prefill(PrefillSettings(**SMALL, out=tmp_path / "prefill.csv"))
    assert old.read_text() == "precious"


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
    monkeypatch.setattr(inference_prefill, "groups_in_memory", lambda *_: [["gpt2"], ["ls"]])
    measure_prefill(PrefillSettings(**SMALL, providers=("gpt2", "ls")))
    assert alive == {"gpt2": [], "ls": []}


@pytest.mark.parametrize("part", ["build", "attend"])
def test_a_provider_that_fails_before_its_turn_is_told(monkeypatch, part):
    method = getattr(Provider, part)

    def fail(provider, *args, **options):
        if provider.name == "mhsa":
            raise RuntimeError("no memory left")
        return method(provider, *args, **options)

    monkeypatch.setattr(Provider, part, fail)
    results = measure_prefill(PrefillSettings(**SMALL, providers=("ls", "mhsa", "gpt2")))
    assert {row.provider for row in results.rows} == {"ls", "gpt2"}
    assert {(remark.provider, remark.text) for remark in results.skipped} == {
        ("mhsa", "failed: RuntimeError: no memory left")
    }


def test_inputs_that_fail_are_told_of_every_provider(monkeypatch):
    def fail(*_args):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(inference_prefill, "_inputs", fail)
    with pytest.raises(ValueError, match="nothing was measured: failed: RuntimeError: no memory left"):
        measure_prefill(PrefillSettings(**SMALL))
