"""What a model costs, against counts by hand and against torch's counter of operations."""

import dataclasses

import pytest
import torch
from tests.model.models import SHAPES, make_config, make_ids, make_model
from torch.utils.flop_counter import FlopCounterMode

from longshort.layout import HeadLayout
from longshort.model import (
    decode_flops,
    forward_flops,
    kv_bytes,
    parameter_count,
    prefill_flops,
    preset,
    training_flops,
)


def test_flops_counted_by_hand() -> None:
    config = make_config(
        vocab_size=10, hidden_size=6, num_attention_heads=2, head_dim=4, intermediate_size=5,
        num_global_heads=1, local_window=3,
    )  # fmt: skip
    flops = forward_flops(config, 5)
    weights = 6 * 3 * 2 * 4 + 2 * 4 * 6 + 6 * 5 + 5 * 6  # qkv, output, up, down
    pairs = (1 + 2 + 3 + 3 + 3) + (1 + 2 + 3 + 4 + 5)  # of the local and of the global head
    assert flops.matrices == 2 * 2 * weights * 5
    assert flops.attention == 2 * (2 * 4 + 2 * 4) * pairs  # two layers; q·k and p·v
    assert flops.lm_head == 2 * 6 * 10 * 5
    assert flops.total == flops.matrices + flops.attention + flops.lm_head
    training = training_flops(config, 5)
    assert dataclasses.astuple(training) == tuple(3 * part for part in dataclasses.astuple(flops))
    assert forward_flops(config, 0).total == 0


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_are_what_torch_counts(name: str) -> None:
    """Attention is one operator, into which torch's counter does not see."""
    model = make_model(**SHAPES[name])
    ids = make_ids(batch=1)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids)
    with FlopCounterMode(display=False) as both:
        model(ids, labels=ids).loss.backward()
    flops = forward_flops(model.config, ids.shape[1])
    assert flops.matrices + flops.lm_head == forward.get_total_flops()
    flops = training_flops(model.config, ids.shape[1])
    assert flops.matrices + flops.lm_head == both.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_a_decoded_token_costs_what_it_adds_to_the_forward_pass(name: str) -> None:
    config = make_config(**SHAPES[name])
    longer, shorter, token = forward_flops(config, 14), forward_flops(config, 13), decode_flops(config, 13)
    assert dataclasses.astuple(token) == tuple(
        more - less
        for more, less in zip(dataclasses.astuple(longer), dataclasses.astuple(shorter), strict=True)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_once(name: str) -> None:
    config = make_config(**SHAPES[name])
    assert parameter_count(config) == make_model(**SHAPES[name]).num_parameters()


def test_parameters_of_the_papers_models() -> None:
    assert parameter_count(preset("paper-base")) == (2 * 10_000 + 8192 + 12 * (12 * 768 + 2) + 1) * 768
    assert parameter_count(preset("paper-large", mhsa=True)) == parameter_count(preset("paper-large"))


def test_cached_bytes_add_up_over_the_layers() -> None:
    config = make_config(
        num_global_heads=[0, 2], local_window=[3, 5], num_key_value_heads=2, head_dim=4, sink_tokens=2
    )
    kept = 2 * (3 + 2) + (5 + 2) + 20  # two local heads; one local and one global
    assert kv_bytes(config, 20, torch.bfloat16) == 2 * kept * 4 * 2
    layouts = [HeadLayout.split(4, 0, 3, 2, 2), HeadLayout.split(4, 2, 5, 2, 2)]
    assert kv_bytes(config, 4, torch.float32) == sum(
        layout.kv_bytes(4, 4, torch.float32) for layout in layouts
    )


@pytest.mark.parametrize("length", [-1, 2.0, True])
def test_wrong_length_is_refused(length: object) -> None:
    config = make_config()
    for count in (forward_flops, decode_flops, training_flops):
        with pytest.raises(ValueError, match="length must be an integer >= 0"):
            count(config, length)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="length must be an integer >= 0"):
        kv_bytes(config, length, torch.float32)  # pyright: ignore[reportArgumentType]


def test_a_prompt_has_logits_for_its_last_token_alone() -> None:
    config = preset("tiny")
    prompt, whole = prefill_flops(config, 100), forward_flops(config, 100)
    assert (prompt.matrices, prompt.attention) == (whole.matrices, whole.attention)
    assert prompt.lm_head == forward_flops(config, 1).lm_head == whole.lm_head // 100
    assert prefill_flops(config, 0).total == 0
