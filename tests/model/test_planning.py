"""Plans against what models with these layouts take."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.model.models import make_config, make_ids, make_model

from longshort.model import LongShortForCausalLM, decode_flops, forward_flops, kv_bytes, plan_layouts


def names(**options: Any) -> list[str]:
    settings: dict[str, Any] = {"global_heads": [1, 2], "windows": [3, 5], **options}
    return [plan.name for plan in plan_layouts(make_config(num_hidden_layers=4), 20, **settings)]


def test_every_combination_comes_after_mhsa_and_before_the_hybrids() -> None:
    assert names(hybrid_window=7) == [
        "all global (MHSA)",
        "1 global, window 3",
        "1 global, window 5",
        "2 global, window 3",
        "2 global, window 5",
        "by layers: 1 of 4, window 7",
        "by layers: 2 of 4, window 7",
    ]
    assert names(global_heads=[0, 4], windows=[3]) == ["all global (MHSA)", "0 global, window 3"]


def test_a_hybrid_of_global_layers_alone_is_left_out() -> None:
    plans = plan_layouts(make_config(num_hidden_layers=1), 9, global_heads=[1], windows=[3])
    assert [plan.name for plan in plans] == ["all global (MHSA)", "1 global, window 3"]


@pytest.mark.parametrize(
    "fields", [{}, {"num_key_value_heads": 2, "sink_tokens": 2}, {"tie_word_embeddings": True}]
)
def test_costs_are_those_of_the_layouts_for_the_whole_batch(fields: dict[str, Any]) -> None:
    config = make_config(num_global_heads=4, **fields)
    plans = plan_layouts(
        config, 20, global_heads=[2], windows=[3], hybrid_window=6, batch=3, dtype=torch.float32
    )
    for plan, global_heads, window in zip(plans, [4, 2, [0, 4]], [3, 3, 6], strict=True):
        expected = make_config(num_global_heads=global_heads, local_window=window, **fields)
        assert plan.config.head_layouts() == expected.head_layouts()
        assert plan.cache_bytes == 3 * kv_bytes(expected, 20, torch.float32)
        assert plan.decode == decode_flops(expected, 20).times(3)
        assert plan.prefill.attention == 3 * forward_flops(expected, 20).attention
        assert plan.prefill.matrices == 3 * forward_flops(expected, 20).matrices
        assert plan.prefill.lm_head == plan.decode.lm_head
        assert plan.longest is None
    assert config.num_global_heads == 4  # not touched


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_a_token_reads_all_weights_but_its_tables_and_the_cache(tied: bool, kind: str) -> None:
    model: LongShortForCausalLM = make_model(tie_word_embeddings=tied, position_embedding=kind)
    plan = plan_layouts(model.config, 20, global_heads=[1], windows=[3], dtype=torch.float32)[1]
    weights = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    weights += model.lm_head.weight.nbytes + sum(
        parameter.nbytes for parameter in model.model.norm.parameters()
    )
    assert plan.decode_bytes == weights + plan.cache_bytes
    cache = model.new_cache()
    with torch.no_grad():
        model(make_ids(batch=1, length=20), past_key_values=cache)
    assert plan.cache_bytes == cache.nbytes_used


def test_an_equal_window_makes_heads_and_layers_cost_the_same() -> None:
    _, by_head, by_layer = plan_layouts(
        make_config(num_hidden_layers=4), 20, global_heads=[1], windows=[3], hybrid_window=3
    )
    for field in dataclasses.fields(by_head):
        if field.name not in ("name", "config"):
            assert getattr(by_head, field.name) == getattr(by_layer, field.name)


@pytest.mark.parametrize(("layers", "whole"), [(5, [4]), (8, [3, 7]), (13, [4, 8, 12])])
def test_global_layers_are_spread(layers: int, whole: list[int]) -> None:
    plan = plan_layouts(make_config(num_hidden_layers=layers), 9, global_heads=[1], windows=[3])[-1]
    found = plan.config.num_global_heads
    assert isinstance(found, list)
    assert [layer for layer, heads in enumerate(found) if heads == 4] == whole
    assert sum(found) == 4 * len(whole)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_longest_context_is_the_last_that_fits(batch: int) -> None:
    config = make_config()
    weights = 2 * LongShortForCausalLM(config).num_parameters()
    options: dict[str, Any] = {"global_heads": [0, 1], "windows": [3], "batch": batch}
    for memory in (weights + 5000, weights + 5001, weights + 10**9):
        for plan in plan_layouts(config, 20, memory=memory, **options):
            if plan.name.startswith("0 global"):
                assert plan.longest is None
                continue
            assert plan.longest is not None
            sizes = [batch * kv_bytes(plan.config, plan.longest + more, torch.bfloat16) for more in (0, 1)]
            assert weights + sizes[0] <= memory < weights + sizes[1]
    assert [plan.longest for plan in plan_layouts(config, 20, memory=weights - 1, **options)] == [0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be an integer >= 1, got 0"),
        ({"batch": 0}, "batch"),
        ({"hybrid_window": 0}, "hybrid_window"),
        ({"memory": 0}, "memory"),
        ({"global_heads": []}, "global_heads must name at least one number, got none"),
        ({"windows": []}, "windows must name at least one number, got none"),
        ({"global_heads": [-1]}, "global_heads must be an integer >= 0, got -1"),
        ({"global_heads": [5]}, "global_heads must be multiples of the 1 .*, and at most all 4 heads, got 5"),
        ({"windows": [0]}, "windows must be an integer >= 1, got 0"),
        ({"dtype": torch.int8}, "dtype must be one of .*, got torch.int8"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"length": 9, "global_heads": [1], "windows": [3], **changes}
    with pytest.raises(ValueError, match=message):
        plan_layouts(make_config(), **options)


def test_shapes_that_have_no_cache_or_no_such_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="no short_convolution, which has no cache, got 3"):
        plan_layouts(make_config(short_convolution=3), 9, global_heads=[1], windows=[3])
    with pytest.raises(ValueError, match=r"multiples of the 2 query heads .*, got 1"):
        plan_layouts(make_config(num_key_value_heads=2), 9, global_heads=[1], windows=[3])
