import json
import weakref

import pytest
import torch
from tests.bench.toy import metrics

from longshort.bench import model_benchmark
from longshort.bench.decode import DecodeBenchmark
from longshort.bench.memory import MemoryBenchmark
from longshort.bench.model_benchmark import ModelBenchmark
from longshort.bench.model_providers import Provider
from longshort.bench.prefill import PrefillBenchmark
from longshort.bench.sweep import Remark, measure


def test_the_sweep():
    powers = [2**exponent for exponent in range(9, 18)]
    assert PrefillBenchmark().sweep() == [512, 1024, 2048, 4096, 8192]
    assert PrefillBenchmark(max_length=131_072).sweep() == powers
    assert PrefillBenchmark(max_length=5000).sweep() == powers[:4]
    assert PrefillBenchmark(lengths=(64, 20_000, 32, 64)).sweep() == [32, 64, 20_000]
    assert PrefillBenchmark(lengths=(64, 20_000, 32), max_length=64).sweep() == [32, 64]
    assert MemoryBenchmark().sweep() == [16_384, 32_768, 65_536]


def test_a_gpu_takes_longer_sequences(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert PrefillBenchmark(device="cuda").sweep()[-1] == 131_072


def test_the_flags_shape_the_model():
    shape = {"preset": "tiny", "lengths": (600,), "layers": 3, "global_heads": 2, "window": 7}
    config = DecodeBenchmark(**shape, rounds=2, tokens=2).config()
    assert (config.num_hidden_layers, config.num_global_heads, config.local_window) == (3, 2, 7)
    assert config.max_position_embeddings == 609
    assert config.hidden_size == 64
    (case,) = PrefillBenchmark(**shape, batch=2, threads=1).cases()
    assert str(case) == "600 tokens, batch 2, float32, 1 thread, tiny, layers: 3"
    assert case.columns == {
        "batch": 2, "dtype": "float32", "threads": 1, "device": "cpu", "preset": "tiny", "layers": 3,
        "heads": 4, "global_heads": 6, "window": 7,
    }  # fmt: skip


def test_the_context_grows_by_what_is_decoded():
    assert DecodeBenchmark(rounds=2, tokens=4).growth == 15


def test_memory_limits(monkeypatch):
    monkeypatch.setattr(model_benchmark, "free_memory", lambda _device: 1000)
    assert PrefillBenchmark().memory_limits == (600, 900)
    assert PrefillBenchmark(max_memory_gib=0.5).memory_limits == (2**29, 2**29)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"providers": ("warp",)}, "--providers must be among ls, mhsa, hybrid, gpt2, mistral, got 'warp'"),
        ({"providers": ()}, "--providers must name at least one, got none"),
        ({"dtype": "float16"}, "--dtype must be among float32, bfloat16, got 'float16'"),
        ({"device": "tpu"}, "--device must be among cpu, cuda, got 'tpu'"),
        ({"preset": "huge"}, "preset must be one of tiny, .*, got 'huge'"),
        ({"lengths": ()}, "--lengths must name at least one, got none"),
        ({"lengths": (0,)}, "--lengths must be an integer >= 1, got 0"),
        ({"max_length": 0}, "--max-length must be an integer >= 1, got 0"),
        ({"max_length": 511}, "--max-length must be at least the shortest length, 512, got 511"),
        ({"batch": 0}, "--batch must be an integer >= 1, got 0"),
        ({"layers": 0}, "--layers must be an integer >= 1, got 0"),
        ({"threads": 0}, "--threads must be an integer >= 1, got 0"),
        ({"window": 0}, "--window must be an integer >= 1, got 0"),
        ({"global_heads": -1}, "--global-heads must be an integer >= 0, got -1"),
        ({"max_length": 9, "lengths": (64, 32)}, "--max-length .* the shortest length, 32, got 9"),
        ({"global_heads": 13}, "--global-heads must be .* at most all 12 heads, got 13"),
        ({"tokens": 0}, "--tokens must be an integer >= 1, got 0"),
        ({"rounds": 0}, "--rounds must be an integer >= 1, got 0"),
        ({"max_memory_gib": 0.0}, "--max-memory-gib must be a number > 0, got 0.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecodeBenchmark(**changes)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        MemoryBenchmark(device="cuda")


def test_rounds_of_the_prefill_are_checked():
    with pytest.raises(ValueError, match="--rounds must be an integer >= 1, got 0"):
        PrefillBenchmark(rounds=0)


def test_the_shortest_length_of_memory_is_named():
    with pytest.raises(ValueError, match="the shortest length, 16384, got 8192"):
        MemoryBenchmark(max_length=8192)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_convolution": 3}, "no short_convolution"),
        ({"softcap": 9.0}, "no softcap: attention alone"),
        ({"sink_logits": True}, "no sink_logits"),
        ({"position_embedding": "alibi"}, "no ALiBi positions"),
        ({"position_embedding": "rope", "global_position_embedding": "alibi"}, "no ALiBi positions"),
        ({"attention_precision": "fp32"}, "no attention_precision but 'input'"),
    ],
    ids=str,
)
def test_models_whose_attention_is_another_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match="--preset must have " + message):
        PrefillBenchmark(preset=shape(tmp_path, fields))


def test_flags_that_do_not_fit_the_preset_are_named(tmp_path):
    layouts = shape(tmp_path, {"layouts": [[3, 3, None, None]] * 2})
    assert PrefillBenchmark(preset=layouts).config().layouts is not None
    with pytest.raises(ValueError, match=r"--global-heads and the layouts of --preset .* together, got 1"):
        PrefillBenchmark(preset=layouts, global_heads=1)
    with pytest.raises(ValueError, match=r"--window and the layouts of --preset .* together, got 1"):
        PrefillBenchmark(preset=layouts, window=1)
    grouped = shape(tmp_path, {"num_key_value_heads": 2})
    with pytest.raises(ValueError, match=r"--global-heads must be a multiple of the 2 query heads .*, got 1"):
        PrefillBenchmark(preset=grouped, global_heads=1)


def shape(folder, fields):
    file = folder / "shape.json"
    file.write_text(json.dumps({"preset": "tiny", **fields}))
    return str(file)


SMALL = {"preset": "tiny", "lengths": (64,), "global_heads": 2, "window": 9, "rounds": 1}
BOTH = pytest.mark.parametrize("kind", [PrefillBenchmark, DecodeBenchmark], ids=["prefill", "decode"])


@BOTH
def test_models_that_do_not_fit_together_are_measured_apart(kind):
    benchmark = kind(**SMALL, providers=("gpt2", "ls", "mhsa"))
    taken = {name: benchmark.memory_of(benchmark.provider(name), 64) for name in benchmark.providers}
    together = sum(taken[name][0] for name in ("ls", "mhsa")) + max(taken[name][1] for name in ("ls", "mhsa"))
    limit = together / 2**30 * 1.001
    found = metrics(measure(kind(**SMALL, providers=("gpt2", "ls", "mhsa"), max_memory_gib=limit)))
    assert [name for _, name in found] == ["ls", "mhsa", "gpt2"]
    assert "speedup_over_mhsa" in found[64, "ls"]
    assert "speedup_over_gpt2" not in found[64, "ls"]
    assert "speedup_over_mhsa" not in found[64, "gpt2"]
    if kind is DecodeBenchmark:  # bytes are compared nevertheless
        ratio = found[64, "mhsa"]["bytes_read"] / found[64, "gpt2"]["bytes_read"]
        assert found[64, "gpt2"]["floor_ratio"] == pytest.approx(ratio, rel=1e-3)


@BOTH
def test_one_group_is_gone_when_the_next_is_built(kind, monkeypatch):
    alive: dict[str, list[str]] = {}
    models: dict[str, weakref.ref] = {}
    build = Provider.build

    def spy(provider, device, dtype):
        alive[provider.name] = [name for name, model in models.items() if model() is not None]
        model = build(provider, device, dtype)
        models[provider.name] = weakref.ref(model)
        return model

    monkeypatch.setattr(Provider, "build", spy)
    monkeypatch.setattr(ModelBenchmark, "groups", lambda *_: [["gpt2"], ["ls"]])
    measure(kind(**SMALL, providers=("gpt2", "ls")))
    assert alive == {"gpt2": [], "ls": []}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (PrefillBenchmark, "build"),
        (PrefillBenchmark, "attend"),
        (DecodeBenchmark, "build"),
        (DecodeBenchmark, "filled_cache"),
    ],
)
def test_a_provider_that_fails_before_its_turn_is_left_out(kind, part, monkeypatch):
    method = getattr(Provider, part)

    def fail(provider, *args, **options):
        if provider.name == "mhsa":
            raise RuntimeError("no memory left")
        return method(provider, *args, **options)

    monkeypatch.setattr(Provider, part, fail)
    results = measure(kind(**SMALL, providers=("ls", "mhsa", "gpt2")))
    assert set(results.rows["provider"]) == {"ls", "gpt2"}
    setting = "64 tokens, batch 1, float32, 1 thread, tiny, layers: 2"
    assert results.left_out == [Remark("mhsa", setting, "failed: RuntimeError: no memory left")]


@BOTH
def test_inputs_that_fail_leave_out_every_provider(kind, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model_benchmark.torch, "randint", fail)
    with pytest.raises(ValueError, match="nothing was measured: failed: RuntimeError: no memory left"):
        measure(kind(**SMALL))


@pytest.mark.parametrize("kind", [PrefillBenchmark, DecodeBenchmark, MemoryBenchmark])
def test_what_does_not_fit_or_cannot_follow_is_left_out(kind):
    shape = {"preset": "tiny", "lengths": (64,), "global_heads": 1, "max_memory_gib": 1e-6}
    with pytest.raises(
        ValueError,
        match=r"nothing was measured: 2 global heads in 2 .*; takes about .* GiB, 1e-06 are allowed",
    ):
        measure(kind(**shape, providers=("hybrid", "ls")))
