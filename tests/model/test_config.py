"""`LongShortConfig`: what it resolves, what it refuses, and its way through JSON."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from longshort.layout import HeadLayout
from longshort.model import LongShortConfig


def make_config(**fields: Any) -> LongShortConfig:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LongShortConfig(**{**sizes, **fields})


def test_what_is_left_out_is_resolved() -> None:
    config = make_config()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 8
    assert config.intermediate_size == 4 * 32
    assert config.num_global_heads == 1
    assert config.local_window == 100
    assert config.layouts is None
    assert config.use_cache is True
    assert make_config(num_key_value_heads=2).num_global_heads == 2
    assert make_config(short_convolution=2).use_cache is False


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 4, 4), (4, 2, 8), (8, 1, 16), (6, 3, 5)]
)
def test_matched_width_gives_every_block_the_same_number_of_weights(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    config = make_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    d = config.hidden_size
    assert config.intermediate_size == 6 * d - (heads + kv_heads) * head_dim
    if heads == kv_heads:
        assert config.intermediate_size == 4 * d + 2 * (d - heads * head_dim)
    attention = d * (heads + 2 * kv_heads) * head_dim + heads * head_dim * d
    assert attention + 2 * d * config.intermediate_size == 12 * d * d


def test_layouts_of_one_split_for_all_layers() -> None:
    config = make_config(num_global_heads=1, local_window=7, sink_tokens=2)
    assert config.head_layouts() == [HeadLayout.split(4, 1, 7, sink_tokens=2)] * 2
    assert config.head_layouts()[0].windows == (7, 7, 7, None)


def test_layouts_by_layer() -> None:
    config = make_config(num_global_heads=[0, 2], local_window=[5, 9], num_key_value_heads=2)
    assert config.head_layouts() == [HeadLayout.split(4, 0, 5, 2), HeadLayout.split(4, 2, 9, 2)]


def test_layouts_of_ones_own() -> None:
    config = make_config(layouts=[[None, 3, 3, 8], (2, None, None, 2)])
    assert config.num_global_heads is None and config.local_window is None
    assert [layout.windows for layout in config.head_layouts()] == [(None, 3, 3, 8), (2, None, None, 2)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_global_heads": (0, 2), "local_window": [5, 9]},
        {"layouts": ((None, 3, 3, 8), (2, None, None, 2)), "sink_tokens": 3},
        {"position_embedding": "rope", "global_position_embedding": "none", "rope_theta": 500.0},
        {"attention_precision": "bf16-flash", "softcap": 30.0, "qk_norm": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 10, "initializer_range": 0.1},
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": False},
        {"sink_logits": True, "short_convolution": 4},
        {
            "attention_precision": "sdpa-bf16",
            "position_embedding": "alibi",
            "global_position_embedding": "none",
        },
        {"attention_precision": "sdpa-bf16", "num_global_heads": 0, "softcap": 3.0, "sink_logits": True},
    ],
    ids=lambda fields: "-".join(fields) or "defaults",
)
def test_json_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LongShortConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.head_layouts() == config.head_layouts()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "longshort"
    assert written["intermediate_size"] == config.intermediate_size


def test_position_embeddings_by_head() -> None:
    config = make_config(num_global_heads=[1, 4], position_embedding="rope", global_position_embedding="none")
    assert config.head_position_embeddings() == [["rope"] * 3 + ["none"], ["none"] * 4]
    assert make_config().head_position_embeddings() == [["learned"] * 4] * 2


@pytest.mark.parametrize("local_kind", ["learned", "rope", "alibi", "none"])
@pytest.mark.parametrize("global_kind", ["learned", "rope", "alibi", "none"])
def test_learned_positions_mix_with_no_other_kind(local_kind: str, global_kind: str) -> None:
    fields = {"position_embedding": local_kind, "global_position_embedding": global_kind}
    if "learned" in (local_kind, global_kind) and local_kind != global_kind:
        with pytest.raises(ValueError, match="must both be 'learned' or neither"):
            make_config(**fields)
        # Without heads of one kind there is nothing to mix.
        assert make_config(num_global_heads=4, **fields).head_position_embeddings() == [[global_kind] * 4] * 2
        assert make_config(num_global_heads=0, **fields).head_position_embeddings() == [[local_kind] * 4] * 2
    else:
        assert make_config(**fields).head_position_embeddings() == [[local_kind] * 3 + [global_kind]] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer >= 1, got 32.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be an integer"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be an integer"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads \(4\), got 3"),
        ({"num_attention_heads": 5}, "head_dim is needed: hidden_size 32 is not divisible by .* 5"),
        ({"head_dim": 0}, "head_dim must be an integer >= 1, got 0"),
        ({"head_dim": 24}, r"intermediate_size is needed: the parameter-matched width .* is 0"),
        ({"intermediate_size": -1}, "intermediate_size must be an integer >= 1, got -1"),
        (
            {"num_global_heads": 5},
            "num_global_heads must be .* at most num_attention_heads = 4, got 5 in layer 0",
        ),
        ({"num_global_heads": [1]}, "num_global_heads must have one entry for each of 2 layers, got 1"),
        ({"num_global_heads": [1, -1]}, "num_global_heads must be an integer >= 0, got -1"),
        (
            {"num_global_heads": 1, "num_key_value_heads": 2},
            "num_global_heads must be a multiple of the 2 query",
        ),
        ({"local_window": 0}, "local_window must be an integer >= 1, got 0"),
        ({"local_window": [3, 4, 5]}, "local_window must have one entry for each of 2 layers, got 3"),
        ({"local_window": "3"}, "local_window must be an integer"),
        ({"layouts": 3}, "layouts must be a list with one list of windows per layer, got 3"),
        ({"layouts": [[3] * 4]}, "layouts must have one entry for each of 2 layers, got 1"),
        ({"layouts": [[3] * 4, [3] * 3]}, r"layouts\[1\] must be a list of 4 windows"),
        ({"layouts": [[3] * 4, 3]}, r"layouts\[1\] must be a list of 4 windows, .*got 3"),
        ({"layouts": [[3, 3, 3, 0], [3] * 4]}, r"layouts\[0\]: windows\[3\] must be an integer >= 1, got 0"),
        ({"layouts": [[3, 4, 5, 5]] * 2, "num_key_value_heads": 2}, r"layouts\[0\]: windows of query heads"),
        ({"layouts": [[3] * 4] * 2, "local_window": 3}, "layouts replaces num_global_heads and local_window"),
        ({"layouts": [[3] * 4] * 2, "num_global_heads": 0}, "layouts replaces num_global_heads"),
        ({"sink_tokens": -1}, "sink_tokens must be an integer >= 0, got -1"),
        ({"position_embedding": "sine"}, "position_embedding must be one of .*got 'sine'"),
        ({"position_embedding": None}, "position_embedding must be one of .*got None"),
        ({"global_position_embedding": "sine"}, "global_position_embedding must be one of .*got 'sine'"),
        ({"position_embedding": "rope", "head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"rope_theta": 0}, "rope_theta must be a finite number > 0, got 0"),
        ({"attention_precision": "fp16"}, "attention_precision must be one of .*got 'fp16'"),
        ({"attention_precision": "sdpa-bf16", "softcap": 3.0}, "'sdpa-bf16' does not go with softcap=3.0"),
        ({"attention_precision": "sdpa-bf16", "sink_logits": True}, "'sdpa-bf16' .* sink_logits=True"),
        (
            {"attention_precision": "sdpa-bf16", "position_embedding": "alibi", "num_global_heads": [0, 1]},
            "'sdpa-bf16' does not go with ALiBi",
        ),
        ({"softcap": -1.0}, "softcap must be a finite number > 0, got -1.0"),
        ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"use_cache": 1}, "use_cache must be true or false, got 1"),
        ({"sink_logits": 1}, "sink_logits must be true or false, got 1"),
        ({"short_convolution": 1}, "short_convolution must be an integer >= 2, got 1"),
        ({"short_convolution": True}, "short_convolution must be an integer >= 2, got True"),
        ({"short_convolution": 3, "use_cache": True}, "use_cache must be false with short_convolution"),
        ({"initializer_range": math.nan}, "initializer_range must be a finite number > 0, got nan"),
        ({"pad_token_id": 50}, "pad_token_id must be below vocab_size = 50, got 50"),
        ({"bos_token_id": [1]}, r"bos_token_id must be an integer >= 0, got \[1\]"),
        ({"eos_token_id": [1, 50]}, "eos_token_id must be below vocab_size = 50, got 50"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_check_sees_attributes_that_were_set_later() -> None:
    config = make_config()
    config.local_window = 0
    with pytest.raises(ValueError, match="local_window must be an integer >= 1, got 0"):
        config.check()
    config.local_window = 5
    config.check()
