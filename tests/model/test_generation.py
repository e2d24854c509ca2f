"""`generate()` with a growing cache against recomputing everything at each step."""

from typing import Any

import pytest
import torch
from tests.model.models import SHAPES, make_ids, make_model
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import StaticCache


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    config = GenerationConfig(max_new_tokens=12, pad_token_id=0, **options)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def greedy_by_hand(model: Any, ids: Tensor, steps: int = 12) -> Tensor:
    for _ in range(steps):
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    return ids


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_greedy_equals_recomputation(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    ids = make_ids(length=5)
    expected = greedy_by_hand(model, ids)
    assert expected[:, 5:].unique().numel() > 1  # no dull repetition that anything would equal
    assert torch.equal(generate(model, ids, do_sample=False), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_ways_to_generate_equal_recomputation(options: dict[str, Any]) -> None:
    model = make_model(position_embedding="rope", global_position_embedding="alibi")
    ids = make_ids(length=5)
    chunked = options.pop("prefill_chunk_size", None)
    expected = generate(model, ids, use_cache=False, **options)
    assert torch.equal(generate(model, ids, prefill_chunk_size=chunked, **options), expected)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_a_left_padded_batch_continues_each_sequence_as_alone(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    ids = make_ids(batch=3, length=7)
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7, [0] + [1] * 6])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, generation_config=config)
    for row in range(3):
        alone = greedy_by_hand(model, ids[row][mask[row].bool()][None])
        assert torch.equal(out[row, 7:], alone[0, -12:])


def test_a_prompt_of_embeddings() -> None:
    model = make_model()
    ids = make_ids(length=5)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), generation_config=config)
    assert torch.equal(out, greedy_by_hand(model, ids)[:, 5:])


def test_assisted_generation_gives_the_model_s_own_text() -> None:
    model, assistant = make_model(), make_model(seed=1, num_hidden_layers=1)
    ids = make_ids(batch=1, length=5)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=assistant
    )
    assert torch.equal(out, greedy_by_hand(model, ids))


def test_learned_positions_end() -> None:
    model = make_model()  # 40 positions
    with pytest.raises(
        ValueError, match=r"position_ids must be .*below max_position_embeddings = 40, got 40"
    ):
        generate(model, make_ids(length=30))
    assert generate(make_model(position_embedding="rope"), make_ids(length=30), do_sample=False).shape == (
        2,
        42,
    )


def test_static_caches_are_refused() -> None:
    model = make_model()
    ids = make_ids(length=5)
    with pytest.raises(
        ValueError, match=r"attention_mask must be .* a mask per query and key cannot be used"
    ):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="past_key_values must be a cache that keeps every token"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=20))
