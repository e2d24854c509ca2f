"""What the models refuse, by name."""

from typing import Any

import pytest
import torch
from tests.model.models import VOCAB, make_config, make_ids, make_model
from transformers.cache_utils import DynamicCache

from longshort.model import LongShortForCausalLM, LongShortModel

IDS = make_ids()
WRONG: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no-ids": (ValueError, {"input_ids": None}, "exactly one of input_ids and inputs_embeds .*got neither"),
    "two-inputs": (ValueError, {"inputs_embeds": torch.zeros(2, 13, 16)}, "exactly one of .*got both"),
    "list": (TypeError, {"input_ids": [[1]]}, "input_ids must be a torch.Tensor, got list"),
    "flat": (ValueError, {"input_ids": IDS[0]}, r"input_ids must be .*got shape \(13,\)"),
    "float": (ValueError, {"input_ids": IDS.float()}, "input_ids must be .*of torch.float32"),
    "large-id": (ValueError, {"input_ids": IDS + VOCAB}, "input_ids must be .*below vocab_size = 37, got"),
    "negative-id": (ValueError, {"input_ids": IDS - 100}, "input_ids must be at least 0 .*got -"),
    "embeds": (
        ValueError, {"input_ids": None, "inputs_embeds": torch.zeros(2, 13, 8)},
        r"inputs_embeds must be .*hidden_size = 16\), got shape \(2, 13, 8\)",
    ),
    "long": (ValueError, {"input_ids": make_ids(length=41)}, "max_position_embeddings = 40 tokens, got 41"),
    "position": (
        ValueError, {"position_ids": torch.arange(28, 41)[None]},
        "position_ids must be .*below max_position_embeddings = 40, got 40",
    ),
    "positions-shape": (
        ValueError, {"position_ids": torch.zeros(2, 3).long(), "segment_ids": torch.zeros(2, 13).long()},
        r"position_ids must be .*got shape \(2, 3\)",
    ),
    "positions-list": (TypeError, {"position_ids": [0]}, "position_ids must be a torch.Tensor"),
    "mask-4d": (ValueError, {"attention_mask": torch.ones(2, 1, 13, 13)}, "attention_mask .*per query"),
    "mask-short": (ValueError, {"attention_mask": torch.ones(2, 12)}, "attention_mask must be"),
    "segments": (ValueError, {"segment_ids": torch.zeros(2, 3).long()}, r"segment_ids must be .*\(2, 3\)"),
    "segments-list": (TypeError, {"segment_ids": [0]}, "segment_ids must be a torch.Tensor"),
    "segments-float": (ValueError, {"segment_ids": torch.zeros(2, 13)}, "segment_ids must have an integer"),
    "labels": (ValueError, {"labels": IDS[:, 1:]}, r"labels must be .*int64, got shape \(2, 12\)"),
    "labels-float": (ValueError, {"shift_labels": IDS.float()}, "shift_labels must be .*torch.float32"),
    "labels-list": (TypeError, {"labels": [1]}, "labels must be a torch.Tensor, got list"),
    "kept-labels": (ValueError, {"labels": IDS, "logits_to_keep": 1}, "logits_to_keep must be 0 with labels"),
    "kept": (ValueError, {"logits_to_keep": -1}, "logits_to_keep must be an integer >= 0 .*got -1"),
    "attentions": (ValueError, {"output_attentions": True}, "output_attentions must be false"),
    "cache": (TypeError, {"past_key_values": ((IDS, IDS),)}, "past_key_values must be a transformers Cache"),
    "unknown": (TypeError, {"attn_mask": IDS, "cu_seq_lens_q": IDS}, "not know: attn_mask, cu_seq_lens_q;"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(error: type[Exception], call: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model()(**{"input_ids": IDS, **call})


@pytest.mark.parametrize("call", [{"use_cache": True}, {"past_key_values": DynamicCache()}], ids="-".join)
def test_a_short_convolution_takes_no_cache(call: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not go with short_convolution, which keeps no state"):
        make_model(short_convolution=2)(IDS, **call)


def test_a_config_that_was_broken_later_is_refused() -> None:
    config = make_config()
    config.local_window = -1
    with pytest.raises(ValueError, match="local_window must be an integer >= 1, got -1"):
        LongShortModel(config)


def test_other_attention_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        LongShortForCausalLM(make_config(attn_implementation="flash_attention_2"))
