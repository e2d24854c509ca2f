"""`generate()` with the split cache against recomputing everything at each step."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.models import CACHED_SHAPES, SHAPES, make_ids, make_model
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

from longshort.huggingface import SplitCache
from longshort.model import LongShortForCausalLM, kv_bytes, preset


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
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


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_a_static_cache_is_a_split_one_of_fixed_size(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    ids = make_ids(length=5)
    out = generate(model, ids, do_sample=False, cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(out.past_key_values, SplitCache)
    assert out.past_key_values.get_max_length() == 16 == out.past_key_values.get_seq_length()
    assert torch.equal(out.sequences, greedy_by_hand(model, ids))


@torch.no_grad()
def test_cache_is_another_name_of_past_key_values() -> None:
    model, ids = make_model(), make_ids(length=5)
    expected = model(ids).logits
    for name in ("past_key_values", "cache"):
        cache = model.new_cache()
        got = [model(part, **{name: cache}).logits for part in ids.split(3, dim=1)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == 5
        cache = model.new_cache()
        text = model.generate(ids, max_new_tokens=12, do_sample=False, **{name: cache})
        assert torch.equal(text, greedy_by_hand(model, ids))
        assert cache.get_seq_length() > 5
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        model(ids, cache=cache, past_key_values=cache)


def test_static_caches_of_transformers_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="past_key_values must be a SplitCache or keep every token"):
        model(make_ids(length=5), past_key_values=StaticCache(model.config, max_cache_len=20))


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_the_default_cache_keeps_what_heads_can_see(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    out = generate(model, make_ids(batch=2, length=5), do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, SplitCache) and cache.get_seq_length() == 16
    assert cache.nbytes_used == 2 * kv_bytes(model.config, 16, torch.float32)
    assert cache.nbytes_used <= cache.nbytes_allocated <= 1.5 * cache.nbytes_used


def test_what_cannot_be_chunked_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**SHAPES["own-layouts"])
    monkeypatch.setattr(model.model, "prefill_bytes", 9000)
    ids = make_ids(batch=1, length=23)
    packed = torch.arange(23)[None] % 12
    with torch.no_grad():
        expected = model(ids, position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(model(ids, position_ids=packed).logits, expected)
        seen = []
        model.model.layers[0].attention.observer = seen.append
        model(ids)
    assert [observation.k.shape[2] for observation in seen] == [23]


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_greedy_text_is_that_with_a_growing_cache(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    ids = make_ids(length=5)
    expected = generate(model, ids, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(generate(model, ids, do_sample=False), expected)


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
@pytest.mark.parametrize("max_length", [None, 24])
def test_prompts_in_chunks_and_token_by_token_equal_one_pass(
    fields: dict[str, Any], max_length: int | None
) -> None:
    model = make_model(**fields)
    ids = make_ids(batch=3, length=20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # on the left
    mask[1, 13:] = 0  # on the right
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for sizes in ([20], [7, 1, 2, 10], [1] * 20, [2, 9, 9]):
            cache, end, pieces = model.new_cache(max_length=max_length), 0, []
            for part in ids.split(sizes, dim=1):
                end += part.shape[1]
                pieces.append(model(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
            visible = mask.bool()[..., None]
            torch.testing.assert_close(
                torch.cat(pieces, 1) * visible, expected * visible, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_long_prompts_go_through_the_layers_in_chunks(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**fields)
    ids = make_ids(batch=2, length=23)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    lengths = []
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, logits_to_keep=1).logits
        monkeypatch.setattr(model.model, "prefill_bytes", 9000)
        model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        got = model(ids, attention_mask=mask, logits_to_keep=1)
    assert len(lengths) > 2 and sum(lengths) == 23
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)
    assert got.past_key_values.get_seq_length() == 23


@pytest.mark.parametrize("sink_tokens", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_the_step_compiles_with_a_cache_of_fixed_size(sink_tokens: int) -> None:
    model = make_model(num_hidden_layers=1, num_global_heads=1, local_window=4, sink_tokens=sink_tokens)
    compiled = torch.compile(model, fullgraph=True)
    caches = [model.new_cache(max_length=30) for _ in range(2)]
    ids = make_ids(batch=1, length=12)
    compilations = torch._dynamo.utils.counters["stats"]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :4], past_key_values=cache)
        for step in range(4, 12):
            token = ids[:, step : step + 1]
            got = compiled(token, past_key_values=caches[0], logits_to_keep=1).logits
            expected = model(token, past_key_values=caches[1], logits_to_keep=1).logits
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            if step == 9:
                graphs = compilations["unique_graphs"]
    assert compilations["unique_graphs"] == graphs  # lengths have become symbols


def test_drafts_from_the_prompt_are_taken_back() -> None:
    model = make_model(max_position_embeddings=600)
    ids = make_ids(batch=1, length=4).repeat(1, 80)
    config = GenerationConfig(
        max_new_tokens=40, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=180
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert torch.equal(out, greedy_by_hand(model, ids, steps=40))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_long_drafts_of_an_assistant_are_taken_back(seed: int) -> None:
    model, assistant = make_model(max_position_embeddings=400), make_model(seed, max_position_embeddings=400)
    assistant.generation_config.num_assistant_tokens = 180
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = make_ids(batch=1, length=20)
    config = GenerationConfig(max_new_tokens=200, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, generation_config=config, assistant_model=assistant)
    assert torch.equal(out, greedy_by_hand(model, ids, steps=200))


def test_a_returned_cache_goes_on() -> None:
    model = make_model()
    ids = make_ids(batch=1, length=5)
    first = generate(model, ids, do_sample=False, return_dict_in_generate=True)
    again = generate(model, first.sequences, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(again, greedy_by_hand(model, ids, steps=24))


@pytest.mark.slow
def test_a_thousand_tokens_of_a_trained_model_are_the_same_with_every_cache() -> None:
    torch.manual_seed(0)
    model: Any = LongShortForCausalLM(preset("tiny", max_position_embeddings=1100))
    text = torch.tensor([list(Path(argparse.__file__).read_bytes())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        start = 997 * step % (text.shape[1] - 1100)
        batch = text[:, start : start + 1100]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    prompt = text[:, :40]
    config = GenerationConfig(max_new_tokens=1000, do_sample=False, pad_token_id=0)
    texts = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **options)
        for options in ({}, {"past_key_values": DynamicCache()}, {"use_cache": False})
    ]
    assert texts[0].shape == (1, 1040) and loss < 3.0
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
