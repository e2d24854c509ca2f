import json

import pytest
import torch

from longshort.bench import inference_settings
from longshort.bench.inference_settings import DecodeSettings, MemorySettings, PrefillSettings


def test_the_sweep():
    powers = [2**exponent for exponent in range(9, 18)]
    assert PrefillSettings().sweep() == [512, 1024, 2048, 4096, 8192]
    assert PrefillSettings(max_length=131_072).sweep() == powers
    assert PrefillSettings(max_length=5000).sweep() == powers[:4]
    assert PrefillSettings(lengths=(64, 20_000, 32, 64)).sweep() == [32, 64, 20_000]
    assert PrefillSettings(lengths=(64, 20_000, 32), max_length=64).sweep() == [32, 64]
    assert MemorySettings().sweep() == [16_384, 32_768, 65_536]


def test_a_gpu_takes_longer_sequences(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert PrefillSettings(device="cuda").sweep()[-1] == 131_072


def test_the_flags_shape_the_model():
    config = PrefillSettings(preset="tiny", lengths=(600,), layers=3, global_heads=2, window=7).config(room=9)
    assert (config.num_hidden_layers, config.num_global_heads, config.local_window) == (3, 2, 7)
    assert config.max_position_embeddings == 609
    assert config.hidden_size == 64


def test_the_context_has_room_for_what_is_decoded():
    assert DecodeSettings(rounds=2, tokens=4).room == 15


def test_memory_limits(monkeypatch):
    monkeypatch.setattr(inference_settings, "free_memory", lambda _device: 1000)
    assert PrefillSettings().memory_limits() == (600, 900)
    assert PrefillSettings(max_memory_gib=0.5).memory_limits() == (2**29, 2**29)


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
        DecodeSettings(**changes)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        MemorySettings(device="cuda")


def test_rounds_of_the_prefill_are_checked():
    with pytest.raises(ValueError, match="--rounds must be an integer >= 1, got 0"):
        PrefillSettings(rounds=0)


def test_the_shortest_length_of_memory_is_named():
    with pytest.raises(ValueError, match="the shortest length, 16384, got 8192"):
        MemorySettings(max_length=8192)


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
        PrefillSettings(preset=shape(tmp_path, fields))


def test_flags_that_do_not_fit_the_preset_are_named(tmp_path):
    layouts = shape(tmp_path, {"layouts": [[3, 3, None, None]] * 2})
    assert PrefillSettings(preset=layouts).config().layouts is not None
    with pytest.raises(ValueError, match=r"--global-heads and the layouts of --preset .* together, got 1"):
        PrefillSettings(preset=layouts, global_heads=1)
    with pytest.raises(ValueError, match=r"--window and the layouts of --preset .* together, got 1"):
        PrefillSettings(preset=layouts, window=1)
    grouped = shape(tmp_path, {"num_key_value_heads": 2})
    with pytest.raises(ValueError, match=r"--global-heads must be a multiple of the 2 query heads .*, got 1"):
        PrefillSettings(preset=grouped, global_heads=1)


def shape(folder, fields):
    file = folder / "shape.json"
    file.write_text(json.dumps({"preset": "tiny", **fields}))
    return str(file)
