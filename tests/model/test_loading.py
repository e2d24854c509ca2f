"""Saving and loading, by our classes and by those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.model.models import SHAPES, make_config, make_ids, make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longshort.layers import LongShortAttention
from longshort.model import LongShortForCausalLM, LongShortModel


def load_with_info(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_a_loaded_model_is_the_saved_one(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    rng = torch.get_rng_state()
    loaded, info = load_with_info(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)  # nothing was initialised anew
    assert type(loaded) is LongShortForCausalLM and not loaded.training
    assert not any(info.values())
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    assert torch.equal(loaded(make_ids()).logits, model(make_ids()).logits)


def test_the_decoder_alone_loads_from_the_whole_model(tmp_path: Path) -> None:
    model = make_model(qk_norm=True)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is LongShortModel
    assert torch.equal(decoder(make_ids()).last_hidden_state, model.model(make_ids()).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alibi_slopes_are_right_after_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(num_attention_heads=8, position_embedding="alibi")
    model.save_pretrained(tmp_path)
    loaded = LongShortForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    layers = [module for module in loaded.modules() if isinstance(module, LongShortAttention)]
    assert len(layers) == 2
    for layer in layers:
        assert layer.alibi_slopes is not None and layer.alibi_slopes.dtype == torch.float32
        assert layer.alibi_slopes.tolist() == [2.0**-h for h in range(1, 9)]


def test_tied_embeddings_stay_one_matrix(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - safe_open is no dict
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = make_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_a_missing_weight_is_initialised_as_in_a_new_model(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    wider = AutoConfig.from_pretrained(tmp_path, max_position_embeddings=4000, initializer_range=0.02)
    loaded, info = load_with_info(tmp_path, config=wider, ignore_mismatched_sizes=True)
    assert {name for name, *_ in info["mismatched_keys"]} == {"model.embed_positions.weight"}
    assert loaded.model.embed_positions.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(loaded.lm_head.weight, make_model().lm_head.weight)


def test_from_config_and_embeddings_that_grow() -> None:
    model = AutoModelForCausalLM.from_config(make_config())
    assert type(model) is LongShortForCausalLM
    model.resize_token_embeddings(50, mean_resizing=False)
    assert model.config.vocab_size == 50
    out = model(torch.tensor([[49, 3]]), labels=torch.tensor([[49, 3]]))
    assert out.logits.shape == (1, 2, 50) and out.loss.isfinite()
