"""Small models for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from longshort.model import LongShortConfig, LongShortForCausalLM

VOCAB = 37
SHAPES: dict[str, dict[str, Any]] = {
    "long-short": {},
    "mhsa": {"num_global_heads": 4},
    "grouped": {"num_key_value_heads": 2, "num_global_heads": 2},
    "narrow-heads": {"head_dim": 2},
    "rope": {"position_embedding": "rope", "rope_theta": 100.0},
    "alibi": {"position_embedding": "alibi"},
    "no-positions": {"position_embedding": "none"},
    "rope-and-none": {"position_embedding": "rope", "global_position_embedding": "none"},
    "alibi-and-rope": {"position_embedding": "alibi", "global_position_embedding": "rope"},
    "qk-norm": {"qk_norm": True, "position_embedding": "rope"},
    "softcap": {"softcap": 1.5},
    "by-layer": {"num_global_heads": [0, 2], "local_window": [2, 5]},
    "own-layouts": {"layouts": [[None, 3, 1, 3], [2, 4, None, None]], "sink_tokens": 2},
    "tied": {"tie_word_embeddings": True},
    "sink-logits": {"sink_logits": True},
    "short-convolution": {"short_convolution": 3, "num_key_value_heads": 2, "position_embedding": "rope"},
}
"""Fields of the config by what they try."""

CACHED_SHAPES = {name: fields for name, fields in SHAPES.items() if "short_convolution" not in fields}


def make_config(**fields: Any) -> LongShortConfig:
    defaults = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 40, "local_window": 3, "initializer_range": 0.3,
    }  # fmt: skip
    if "layouts" in fields:
        del defaults["local_window"]
    return LongShortConfig(**{**defaults, **fields})


def make_model(seed: int = 0, **fields: Any) -> Any:
    """A `LongShortForCausalLM` whose norms, sinks and convolutions are not as they start, in evaluation mode.
    Type checkers cannot follow `generate()` of transformers, hence Any."""
    torch.manual_seed(seed)
    model = LongShortForCausalLM(make_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("sink_logits", "short_convolution.weight")):
                parameter.add_(torch.randn_like(parameter))
    return model


def make_ids(batch: int = 2, length: int = 13, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
