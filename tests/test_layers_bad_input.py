"""What `LongShortAttention` and `Rotary` refuse, by name."""

import math
import re
from typing import Any

import pytest
import torch
from tests.layer_cases import LAYOUT, GrowingCache, make_input, make_layer

from longshort.cache import LayerCache
from longshort.layers import LongShortAttention, Rotary
from longshort.layout import HeadLayout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be an integer >= 1, got 0"),
        ({"embed_dim": 8.0}, "embed_dim must be an integer"),
        ({"head_dim": None, "embed_dim": 20}, "head_dim is needed: embed_dim 20"),
        ({"head_dim": True}, "head_dim must be an integer"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"attention_precision": "fp8"}, "attention_precision must be one of .*got 'fp8'"),
        ({"sink_logits": 1}, "sink_logits must be True or False, got 1"),
        ({"short_convolution": 1}, "short_convolution must be an integer >= 2, got 1"),
        ({"short_convolution": 3.0}, "short_convolution must be an integer >= 2, got 3.0"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, got 0.0"),
        ({"softcap": math.inf}, "softcap must be a finite number"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes must be 6 finite numbers"),
        ({"alibi_slopes": [math.nan] * 6}, "alibi_slopes must be 6 finite numbers"),
        ({"alibi_slopes": 0.5}, "alibi_slopes must be a sequence"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .*got 'cuda'"),
        ({"head_dim": 7, "rotary": Rotary()}, "head_dim must be even for rotary positions, got 7"),
        ({"rotary": Rotary(skip_heads=(6,))}, r"rotary.skip_heads must be query heads 0 ... 5, got \(6,\)"),
        (
            {"rotary": Rotary(skip_heads=(1, 2, 3))},
            r"share a key/value head .*where heads \[0, 1\] share one",
        ),
    ],
)
def test_bad_constructor_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongShortAttention(**{"embed_dim": 20, "layout": LAYOUT, "head_dim": 8, **options})


def test_bad_constructor_types_are_named() -> None:
    with pytest.raises(TypeError, match="layout must be a HeadLayout, got list"):
        LongShortAttention(20, [3, None])  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"rotary must be a Rotary, such as Rotary\(base=10_000.0\), or None, got "
    ):
        LongShortAttention(20, LAYOUT, 8, rotary=10_000.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 0.0}, "base must be a finite number > 0, got 0.0"),
        ({"base": "big"}, "base must be a finite number"),
        ({"skip_heads": 3}, "skip_heads must be a sequence"),
        ({"skip_heads": (-1,)}, "every entry of skip_heads must be an integer >= 0, got -1"),
        ({"skip_heads": (1.0,)}, "every entry of skip_heads must be an integer"),
    ],
)
def test_bad_rotary_fields_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotary(**options)


X = make_input()


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, {"hidden_states": [[1.0]]}, "hidden_states must be a torch.Tensor, got list"),
        (
            ValueError,
            {"hidden_states": X[0]},
            r"hidden_states must be .*embed_dim = 20\), got shape \(11, 20\)",
        ),
        (ValueError, {"hidden_states": X[..., :5]}, r"hidden_states .*got shape \(2, 11, 5\)"),
        (TypeError, {"segment_ids": [0] * 11}, "segment_ids must be a torch.Tensor, got list"),
        (ValueError, {"segment_ids": torch.zeros(2, 11)}, "segment_ids must have an integer dtype"),
        (ValueError, {"segment_ids": torch.zeros(2, 12, dtype=torch.int64)}, r"segment_ids .*\(2, 12\)"),
        (ValueError, {"segment_ids": torch.zeros(11, dtype=torch.int64)}, r"segment_ids .*\(11,\)"),
        (
            ValueError,
            {"segment_ids": torch.zeros(2, 11, dtype=torch.int64, device="meta")},
            "segment_ids must be on",
        ),
        (TypeError, {"position_ids": 3}, "position_ids must be a torch.Tensor, got int"),
        (ValueError, {"position_ids": torch.zeros(2, 11)}, "position_ids must have an integer dtype"),
        (ValueError, {"position_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"position_ids .*\(2, 3\)"),
    ],
)
def test_bad_forward_arguments_are_named_before_the_cache_grows(
    error: type[Exception], call: dict[str, Any], message: str
) -> None:
    cache = GrowingCache()
    with pytest.raises(error, match=message):
        make_layer(rotary=Rotary())(**{"hidden_states": X, "cache": cache, **call})
    assert cache.length == 0


def test_a_short_convolution_takes_no_cache() -> None:
    cache = GrowingCache()
    message = "cache must be None: short_convolution keeps no state for decoding, got GrowingCache"
    with pytest.raises(ValueError, match=message):
        make_layer(short_convolution=3)(X, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    "layout",
    [
        HeadLayout((4, *LAYOUT.windows[1:]), 6),
        HeadLayout(LAYOUT.windows, LAYOUT.num_kv_heads, sink_tokens=LAYOUT.sink_tokens + 1),
        HeadLayout(LAYOUT.windows),
        HeadLayout(LAYOUT.windows * 2, LAYOUT.num_kv_heads * 2),
    ],
    ids=["windows", "sink-tokens", "kv-heads", "heads"],
)
@pytest.mark.parametrize("is_observed", [False, True], ids=["", "observed"])
def test_a_cache_of_another_layout_is_refused(layout: HeadLayout, is_observed: bool) -> None:
    layer, cache = make_layer(), LayerCache(layout)
    layer.observer = (lambda _: None) if is_observed else None
    message = f"cache must have the layout of the layer, {LAYOUT!r}, got {layout!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(X, cache=cache)
    assert cache.length == 0
    layer(X, cache=LayerCache(HeadLayout(LAYOUT.windows, LAYOUT.num_kv_heads, LAYOUT.sink_tokens)))
