"""Decoders that also see: tokens of text attend by layouts, those of an image are refused."""

from typing import Any

import pytest
import torch
from tests.huggingface.decoders import make_seeing_decoder
from transformers import GenerationConfig

from longshort.huggingface import SplitCache, apply

IMAGE = [0] * 8 + [1] * 3 + [0] * 13


def make_model() -> Any:
    model = make_seeing_decoder()
    apply(model, num_global_heads=2, window=4, sink_tokens=1)
    return model


def batch(kinds=None) -> dict[str, Any]:
    """Two sequences, the first one padded, with token_type_ids if kinds are given."""
    ids = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    types = {} if kinds is None else {"token_type_ids": torch.tensor([[0] * 24, kinds])}
    return {"input_ids": ids, "attention_mask": mask, **types}


@pytest.mark.parametrize("train", [False, True])
def test_token_type_ids_of_text_change_nothing(train):
    model = make_model().train(train)
    given = model(**batch([0] * 24))
    assert torch.equal(given.logits, model(**batch()).logits)


def test_text_is_generated_with_token_type_ids():
    model = make_model()
    found = []
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        settings = GenerationConfig(
            max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **options,
            return_dict_in_generate=True,
        )  # fmt: skip
        found.append(model.generate(**batch([0] * 24), generation_config=settings))
    assert isinstance(found[1].past_key_values, SplitCache)
    assert all(torch.equal(out.sequences, found[0].sequences) for out in found)


def test_tokens_of_an_image_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"must be causal .* the tokens of an image .*\(token_type_ids\)"):
        model(**batch(IMAGE))
