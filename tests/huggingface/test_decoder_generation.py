"""Generation with the split cache in decoders of transformers, against generation without a cache."""

from typing import Any

import pytest
import torch
import transformers as hf
from tests.huggingface.decoders import VOCAB, make_decoder
from transformers import GenerationConfig

from longshort.huggingface import SplitCache, apply, attention_layers, layouts_of, remove, split_cache

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 7},
    "fixed length": {"do_sample": False, "cache_implementation": "static"},
}
FAMILIES = ("llama", "gemma3", "gpt_oss", "gpt2", "stablelm")


def make_model(family, window=5, sink_tokens=2) -> Any:
    model = make_decoder(family)
    layer = attention_layers(model)[0]
    group = layer.num_heads // layer.num_kv_heads
    apply(model, num_global_heads=group, window=window, sink_tokens=sink_tokens)
    return model


def tokens(batch=1, length=20):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model, ids, cache=True, mask=None, given=None, **options) -> Any:
    torch.manual_seed(0)
    settings = GenerationConfig(
        max_new_tokens=12, pad_token_id=0, eos_token_id=None, use_cache=cache,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    mask = torch.ones_like(ids) if mask is None else mask
    inputs = {} if given is None else {"past_key_values": given}
    return model.generate(ids, attention_mask=mask, generation_config=settings, **inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param)


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_give_what_they_give_without_a_cache(model, mode):
    ids, options = tokens(), MODES[mode]
    found = generate(model, ids, **options)
    if mode in ("prompt lookup", "prefill in chunks", "fixed length"):  # these need a cache
        options = MODES["greedy"]
    assert torch.equal(found.sequences, generate(model, ids, cache=False, **options).sequences)
    assert isinstance(found.past_key_values, SplitCache)
    layer: Any = found.past_key_values.layers[0]
    assert layer.cache.length == found.sequences.shape[1] - 1
    assert [layer.cache.layout] == (layouts_of(model) or [])[:1]


def test_padded_batches_give_what_their_sequences_give(model):
    ids = tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = generate(model, ids, mask=mask, do_sample=False).sequences[:, 20:]
    short = generate(model, ids[:1, 6:], do_sample=False).sequences[:, 14:]
    whole = generate(model, ids[1:], do_sample=False).sequences[:, 20:]
    assert torch.equal(found, torch.cat([short, whole]))


@pytest.mark.parametrize("mode", ["greedy", "beams", "fixed length"])
def test_padding_on_the_right_gives_what_it_gives_without_a_cache(mode):
    model, ids, options = make_model("llama"), tokens(batch=2), MODES[mode]
    mask = torch.ones_like(ids)
    mask[0, -6:] = 0
    found = generate(model, ids, mask=mask, **options).sequences
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert torch.equal(found, generate(model, ids, mask=mask, cache=False, **options).sequences)


def test_an_assistant_drafts():
    model, assistant, ids = make_model("llama"), make_model("llama", window=3), tokens(length=40)
    torch.manual_seed(0)
    settings = GenerationConfig(max_new_tokens=30, pad_token_id=0, eos_token_id=None, do_sample=False)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings, assistant_model=assistant
    )
    settings.use_cache = False
    truth = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    assert torch.equal(found, truth)


def test_hybrids_keep_the_states_of_their_other_layers():
    model, ids = make_model("lfm2"), tokens()
    found = generate(model, ids, do_sample=False)
    assert torch.equal(found.sequences, generate(model, ids, cache=False, do_sample=False).sequences)
    kinds = [type(layer).__name__ for layer in found.past_key_values.layers]
    assert kinds == ["LinearAttentionLayer", "SplitCacheLayer"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "lfm2"])
def test_other_caches_serve_too(family):
    model, ids = make_model(family), tokens(batch=2)
    cache = hf.DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([11, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_models_whose_keys_cannot_be_split_generate_with_a_dynamic_cache():
    model, ids = make_model("deepseek_v3"), tokens()
    found = generate(model, ids, do_sample=False)
    assert type(found.past_key_values) is hf.DynamicCache
    assert torch.equal(found.sequences, generate(model, ids, cache=False, do_sample=False).sequences)


def test_local_heads_forget_and_memory_is_as_the_layouts_say():
    model, ids = make_model("llama"), tokens(batch=2, length=60)
    cache = split_cache(model)
    model(ids, past_key_values=cache)
    layouts: Any = layouts_of(model)
    assert cache.nbytes_used == sum(2 * layout.kv_bytes(60, 8, torch.float32) for layout in layouts)
    whole: Any = hf.DynamicCache(config=model.config)
    model(ids, past_key_values=whole)
    bytes_of_all = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.layers)
    assert cache.nbytes_used < bytes_of_all / 2


@torch.no_grad()
def test_a_cache_of_fixed_length_and_one_that_is_cropped():
    model, ids = make_model("llama"), tokens(batch=2)
    cache = split_cache(model, rollback=4, max_length=20)
    first = model(ids[:, :15], past_key_values=cache).logits
    model(ids[:, :4], past_key_values=cache)
    cache.crop(-4)
    rest = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="max_length = 20 tokens fit"):
        model(ids[:, :1], past_key_values=cache)


def test_another_kind_of_cache_is_made_when_asked_for():
    model, ids = make_model("llama"), tokens()
    found = generate(model, ids, do_sample=False, cache_implementation="dynamic")
    assert type(found.past_key_values) is hf.DynamicCache
    assert torch.equal(found.sequences, generate(model, ids, do_sample=False).sequences)


@pytest.mark.parametrize("kind", ["offloaded_static", "sliding_window"])
def test_other_caches_of_fixed_length_are_refused(kind):
    model, ids = make_model("llama"), tokens()
    with pytest.raises(ValueError, match="cache_implementation must be None, 'static' or 'dynamic'.*" + kind):
        generate(model, ids, do_sample=False, cache_implementation=kind)


def test_layers_that_attend_in_chunks_have_no_sink_tokens():
    model, ids = make_model("llama4"), tokens(length=40)
    assert model.config.longshort["layouts"][0]["sink_tokens"] == 0
    found = generate(model, ids, do_sample=False)
    assert isinstance(found.past_key_values, SplitCache)
    assert torch.equal(found.sequences, generate(model, ids, cache=False, do_sample=False).sequences)


def test_a_returned_cache_can_be_continued():
    model, ids = make_model("llama"), tokens()
    first = generate(model, ids, do_sample=False)
    more = torch.cat([first.sequences, tokens(length=3)], dim=1)
    found = generate(model, more, do_sample=False, given=first.past_key_values)
    assert torch.equal(found.sequences, generate(model, more, cache=False, do_sample=False).sequences)


@pytest.mark.parametrize("modes", [("greedy", "prompt lookup"), ("prompt lookup", "prompt lookup"),
                                   ("prompt lookup", "greedy"), ("greedy", "prefill in chunks")])  # fmt: skip
def test_a_returned_cache_goes_on_in_another_mode(modes):
    model, ids = make_model("llama"), tokens()
    first = generate(model, ids, **MODES[modes[0]])
    more = torch.cat([first.sequences, tokens(length=3)], dim=1)
    found = generate(model, more, given=first.past_key_values, **MODES[modes[1]])
    assert torch.equal(found.sequences, generate(model, more, cache=False, do_sample=False).sequences)
    assert found.past_key_values is first.past_key_values
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1


def test_embeddings_in_place_of_tokens():
    model, ids = make_model("llama"), tokens()
    embeddings = model.get_input_embeddings()(ids)
    settings = GenerationConfig(max_new_tokens=12, pad_token_id=0, eos_token_id=None, do_sample=False)
    mask = torch.ones_like(ids)
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=settings)
    assert torch.equal(found, generate(model, ids, cache=False, do_sample=False).sequences[:, 20:])


def test_a_model_without_layouts_generates_as_before():
    model, ids = make_model("llama"), tokens()
    remove(model)
    found = generate(model, ids, do_sample=False)
    assert type(found.past_key_values) is hf.DynamicCache
    assert torch.equal(found.sequences, generate(make_decoder("llama"), ids, do_sample=False).sequences)


def test_a_cache_that_the_caller_passes_is_used():
    model, ids = make_model("llama"), tokens()
    cache = split_cache(model)
    settings = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=None, do_sample=False)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, generation_config=settings, past_key_values=cache)
    assert cache.get_seq_length() == out.shape[1] - 1
