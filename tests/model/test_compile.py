"""How many graphs `torch.compile` makes of a model, and that they compute what the model does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.model.models import make_ids, make_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

LENGTHS = (17, 18, 40, 100, 150, 200)
WIDE = 50
"""A window whose ring only a later length fills, which is one more graph for caches that grow."""
SHAPES: dict[str, tuple[dict[str, Any], torch.dtype, bool]] = {
    "learned-bf16-padded": ({}, torch.bfloat16, True),
    "rope-padded": ({"position_embedding": "rope", "local_window": WIDE}, torch.float32, True),
    "alibi-bf16": ({"position_embedding": "alibi", "num_key_value_heads": 2}, torch.bfloat16, False),
    "mhsa-padded": ({"num_global_heads": 4}, torch.float32, True),
    "mhsa-rope-bf16": ({"num_global_heads": 4, "position_embedding": "rope"}, torch.bfloat16, False),
    "mhsa-alibi": ({"num_global_heads": 4, "position_embedding": "alibi"}, torch.float32, False),
    "by-layer": (
        {"num_global_heads": [0, 2], "local_window": [2, WIDE], "sink_logits": True}, torch.float32, False,
    ),
}  # fmt: skip
"""Fields of the config, dtype, and whether the first sequence is padded."""


def has_wide_window(fields: dict[str, Any]) -> bool:
    windows = fields.get("local_window", [])
    return WIDE in (windows if isinstance(windows, list) else [windows])


def pads(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :3] = 0
    return mask


def forward(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    with torch.no_grad():
        for length in LENGTHS:
            ids = make_ids(length=length)
            got, expected = (m(ids, use_cache=False, **call(length)).logits for m in (compiled, model))
            torch.testing.assert_close(got, expected)


def train(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    model.train()
    for length in LENGTHS:
        ids, gradients = make_ids(length=length), []
        for run in (compiled, model):
            model.zero_grad()
            run(ids, labels=ids, **call(length)).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def train_with_checkpointing(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    model.activation_checkpointing_enable()
    train(model, compiled, call)


def prefill(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]], max_length: Any = None) -> None:
    with torch.no_grad():
        for length in LENGTHS:
            caches = [model.new_cache(max_length=max_length) for _ in range(2)]
            for cache, run in zip(caches, (compiled, model), strict=True):
                run(make_ids(length=length), past_key_values=cache, **call(length))
            token, options = make_ids(length=1), call(length + 1)
            got, expected = (model(token, past_key_values=cache, **options).logits for cache in caches)
            torch.testing.assert_close(got, expected)


def prefill_of_fixed_size(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    prefill(model, compiled, call, max_length=201)


def go_on(
    model: Any, compiled: Any, call: Callable[[int], dict[str, Any]], lengths: Any, max_length: Any
) -> None:
    caches = [model.new_cache(max_length=max_length) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(make_ids(length=9), past_key_values=cache, **call(9))
        past = 9
        for length in lengths:
            past += length
            ids = make_ids(length=length, seed=past)
            got, expected = (
                run(ids, past_key_values=cache, **call(past)).logits
                for cache, run in zip(caches, (compiled, model), strict=True)
            )
            torch.testing.assert_close(got, expected)


def chunks(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    go_on(model, compiled, call, LENGTHS, 600)


def decode(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    go_on(model, compiled, call, [1] * 60, None)


def decode_in_fixed_size(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    go_on(model, compiled, call, [1] * 60, 80)


def decode_by_group(model: Any, compiled: Any, call: Callable[[int], dict[str, Any]]) -> None:
    """Without the kernel that serves all groups at once, as on other devices."""
    for block in model.model.layers:
        block.attention.backend = "blockwise"
    decode_in_fixed_size(model, compiled, call)


KINDS = {
    forward: 2,
    train: 2,
    train_with_checkpointing: 2,
    prefill: 2,
    prefill_of_fixed_size: 2,
    chunks: 3,  # padding is cut off once a ring has turned
    decode: 6,  # each with and without growth, for one size of the memory and for any; full rings do not grow
    decode_in_fixed_size: 2,
    decode_by_group: 3,  # as chunks
}
"""What is run, and the graphs that it may take: one for the first length, one for all others."""


def count(kind: Any, fields: dict[str, Any], dtype: torch.dtype, is_padded: bool) -> int:
    torch.compiler.reset()
    model = make_model(max_position_embeddings=700, **fields).to(dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    kind(model, compiled, lambda length: {"attention_mask": pads(2, length)} if is_padded else {})
    return counter.frame_count


@pytest.mark.parametrize(("kind", "graphs"), KINDS.items(), ids=[kind.__name__ for kind in KINDS])
def test_graphs_hold_for_every_length(kind: Any, graphs: int) -> None:
    assert count(kind, {}, torch.float32, is_padded=False) <= graphs


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "dtype", "is_padded"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "graphs"), KINDS.items(), ids=[kind.__name__ for kind in KINDS])
def test_graphs_hold_for_every_length_of_every_shape(
    kind: Any, graphs: int, fields: dict[str, Any], dtype: torch.dtype, is_padded: bool
) -> None:
    if kind in (prefill, decode) and has_wide_window(fields):
        graphs += 1
    assert count(kind, fields, dtype, is_padded) <= graphs


@pytest.mark.parametrize("is_twin", [False, True], ids=["own-cache", "cache-of-a-twin"])
def test_models_of_unequal_layouts_compile_one_after_another(is_twin: bool) -> None:
    """The numbers of their layouts become symbols to the compiler, which is to compare them all the same."""
    torch.compiler.reset()
    token = make_ids(length=1)
    for sink_tokens, window in ((0, 3), (2, 3), (3, 4)):
        fields: dict[str, Any] = {"sink_tokens": sink_tokens, "local_window": window}
        model, other = make_model(**fields), make_model(**fields, num_global_heads=2)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        cache = (make_model(**fields) if is_twin else model).new_cache(max_length=20)
        with torch.no_grad():
            model(make_ids(), past_key_values=cache)
            got = compiled(token, past_key_values=cache).logits
        torch.testing.assert_close(got[:, 0], model(torch.cat([make_ids(), token], 1)).logits[:, -1])
        with pytest.raises(Exception, match="past_key_values must have the layouts of this model"):
            compiled(token, past_key_values=other.new_cache(max_length=20))
