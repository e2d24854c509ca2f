"""Caches and configs are compared with the layers that are there, whoever made them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.models import CACHED_SHAPES, make_ids, make_model
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from longshort.huggingface import SplitCache
from longshort.layout import HeadLayout
from longshort.model import LongShortForCausalLM

IDS = make_ids()
LAYOUTS: dict[str, dict[str, Any]] = {
    "windows": {"local_window": 4},
    "global-heads": {"num_global_heads": 2},
    "sink-tokens": {"sink_tokens": 1},
    "grouped": {"num_key_value_heads": 2, "num_global_heads": 2},
    "last-layer": {"local_window": [3, 4]},
}
"""Models of another layout than `make_model()`."""


def lengths(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize("is_filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_a_cache_of_another_layout_is_refused(fields: dict[str, Any], is_filled: bool) -> None:
    model, other = make_model(), make_model(**fields)
    cache = other.new_cache()
    if is_filled:
        other(IDS, past_key_values=cache)
    before = lengths(cache)
    message = r"past_key_values must have the layouts of this model, HeadLayout\(windows=\(3,\) \* 3 .*, got"
    with torch.no_grad(), pytest.raises(ValueError, match=message) as error:
        model(IDS, past_key_values=cache)
    theirs, ours = (m.model.layers[-1].attention.layout for m in (other, model))
    assert f"{ours!r} in layer" in str(error.value) and str(error.value).endswith(f"got {theirs!r}")
    assert lengths(cache) == before
    with pytest.raises(ValueError, match="past_key_values must have the layouts"):
        model.generate(
            IDS, generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0), past_key_values=cache
        )


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_models_of_equal_layouts_share_caches(fields: dict[str, Any]) -> None:
    """As where the same weights are loaded twice."""
    model, twin = make_model(**fields), make_model(**fields)
    cache = twin.new_cache()
    with torch.no_grad():
        pieces = [
            m(part, past_key_values=cache).logits
            for m, part in zip((model, twin, model), IDS.split([7, 5, 1], dim=1), strict=True)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [SplitCache, DynamicCache])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_fewer_or_more_layers_is_refused(kind: Any, layers: int) -> None:
    model, other = make_model(), make_model(num_hidden_layers=layers)
    cache = other.new_cache() if kind is SplitCache else DynamicCache()
    other(IDS, past_key_values=cache)
    counted = rf"past_key_values must be a cache of 2 layers, as this model has, got one of {layers}"
    is_short = kind is DynamicCache and layers < 2  # one that grows by layers, too
    message = r"past_key_values must hold equally many tokens in each layer, got \[13, 0\]"
    with pytest.raises(ValueError, match=message if is_short else counted):
        model(IDS[:, :1], past_key_values=cache)
    assert lengths(cache) == [13] * layers


def test_a_cache_that_an_interruption_left_uneven_is_refused() -> None:
    model, cache = make_model(), None

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = model.new_cache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match=r"equally many tokens in each layer, got \[14, 13\]"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: model, r"got \(1, 4, 4, torch.float32\)"),
        (lambda model: model.bfloat16(), r"got \(2, 4, 4, torch.bfloat16\)"),
        (lambda _: make_model(head_dim=2), r"got \(2, 4, 2, torch.float32\)"),
        (lambda _: make_model(num_key_value_heads=2, num_global_heads=2), r"got \(2, 2, 4, torch.float32\)"),
    ],
    ids=["batch", "dtype", "head_dim", "kv_heads"],
)
def test_a_growing_cache_of_other_tokens_is_refused(make: Any, message: str) -> None:
    cache, other = DynamicCache(), make(make_model())
    with torch.no_grad():
        other(IDS[:1] if "(1," in message else IDS, past_key_values=cache)
        with pytest.raises(ValueError, match=f"past_key_values must be of this model's .*{message}"):
            make_model()(IDS[:, :1], past_key_values=cache)
    assert lengths(cache) == [13, 13]


def test_a_prompt_in_chunks_that_does_not_fit_changes_nothing() -> None:
    model = make_model()
    model.model.prefill_bytes = 5000
    cache = model.new_cache(max_length=20)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="max_length = 20 tokens fit into the cache, got 13 and 13 more"):
            model(IDS, past_key_values=cache)
    assert lengths(cache) == [13, 13]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({}, {"local_window": 20}),
    "window-by-layer": ({"local_window": [3, 4]}, {"local_window": [4, 3]}),
    "global-heads": ({}, {"num_global_heads": 3}),
    "layouts": ({"layouts": [[None, 3, 1, 3], [2, 4, None, None]]}, {"layouts": [[None, 3, 3, 3]] * 2}),
    "sink-tokens": ({}, {"sink_tokens": 3}),
    "softcap": ({}, {"softcap": 2.0}),
    "precision": ({}, {"attention_precision": "bf16"}),
    "rope-theta": ({"position_embedding": "rope"}, {"rope_theta": 3.0}),
    "rope-to-alibi": ({"position_embedding": "rope"}, {"position_embedding": "alibi"}),
    "alibi-to-none": ({"position_embedding": "alibi"}, {"global_position_embedding": "none"}),
    "no-learned": ({}, {"position_embedding": "none"}),
    "positions": ({}, {"max_position_embeddings": 20}),
    "qk-norm": ({"qk_norm": True}, {"qk_norm": False}),
    "sink-logits": ({"sink_logits": True}, {"sink_logits": False}),
    "layers": ({}, {"num_hidden_layers": 1}),
    "more-layers": ({}, {"num_hidden_layers": 3}),
    "vocabulary": ({}, {"vocab_size": 36}),
    "width": ({}, {"intermediate_size": 20}),
    "tied": ({}, {"tie_word_embeddings": True}),
    "untied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    "convolution": ({}, {"short_convolution": 2, "use_cache": False}),
}
"""Fields of a model, and those that are set on its config afterwards."""


@pytest.mark.parametrize(("fields", "change"), CHANGES.values(), ids=CHANGES)
def test_a_config_that_is_changed_changes_no_model(
    fields: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(**fields)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    options: Any = {"attention_mask": torch.ones_like(IDS), "generation_config": generation}
    before, text = model(IDS, labels=IDS, use_cache=False), model.generate(IDS, **options)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert torch.equal(model(IDS, labels=IDS, use_cache=False).loss, before.loss)
    with torch.no_grad():
        cache = model.new_cache()
        pieces = [model(part, past_key_values=cache).logits for part in IDS.split([9, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(IDS, **options), text)
    with pytest.raises(ValueError, match="config must describe the model that is saved, whose "):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_differs_is_named(tmp_path: Path) -> None:
    model = make_model()
    model.config.sink_tokens = 2
    with pytest.raises(
        ValueError, match=r"whose model.layers.0.attention is .*windows=\(3,\) \* 3.*sink_tok"
    ):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"whose layers.0.attention is "):
        model.model.save_pretrained(tmp_path)


def test_a_layer_that_is_changed_is_not_saved_as_what_it_was(tmp_path: Path) -> None:
    model = make_model()
    model.model.layers[1].attention.layout = HeadLayout.split(4, 1, 9)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS, use_cache=True).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"config must describe .* whose model.layers.1.attention is "):
        model.save_pretrained(tmp_path)


def test_a_model_of_fewer_layers_is_whole_once_its_config_says_so(tmp_path: Path) -> None:
    model = make_model()
    model.model.layers = model.model.layers[:1]
    generation = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    texts = [
        model.generate(
            IDS, attention_mask=torch.ones_like(IDS), generation_config=generation, use_cache=use_cache
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    with pytest.raises(ValueError, match="config must describe the model that is saved"):
        model.save_pretrained(tmp_path)
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    loaded: Any = LongShortForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("fields", CACHED_SHAPES.values(), ids=CACHED_SHAPES)
def test_other_changes_of_a_config_are_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**fields)
    model.config.use_cache, model.config.eos_token_id, model.config.initializer_range = False, 3, 0.5
    model.resize_token_embeddings(50)
    state = torch.get_rng_state()
    model.bfloat16().save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    loaded: Any = LongShortForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.use_cache, loaded.config.eos_token_id, loaded.config.vocab_size) == (False, 3, 50)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
