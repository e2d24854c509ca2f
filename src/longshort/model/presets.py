"""Model shapes by name: the paper's, and one for a laptop."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from longshort.model.config import LongShortConfig

# The fewest global heads, one, is the config's default, also where heads share keys and values.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 257,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "local_window": 16,
    },
    "paper-small": {
        "vocab_size": 10_000,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "local_window": 100,
    },
    "paper-base": {
        "vocab_size": 10_000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "local_window": 100,
    },
    "paper-large": {
        "vocab_size": 10_000,
        "hidden_size": 1280,
        "num_hidden_layers": 36,
        "num_attention_heads": 20,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "local_window": 100,
    },
}
"""Fields of `LongShortConfig` by name of the model. `tiny` reads bytes: 256 values and an end of text."""

_FIELDS = {field.name for field in fields(LongShortConfig)} - {
    field.name for field in fields(PreTrainedConfig)
}


def preset(name: str, mhsa: bool = False, **overrides: Any) -> LongShortConfig:
    """The config of a model by name.

    Args:
        name: a key of `PRESETS`.
        mhsa: all heads global, the baseline: the same weights in number, names and shapes.
        **overrides: fields of `LongShortConfig` to set.

    Raises:
        ValueError: the name or a field is not known, mhsa and overrides contradict each other, or the config
            refuses the fields; the message names what is wrong.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    unknown = sorted(overrides.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"overrides must be fields of LongShortConfig {sorted(_FIELDS)}, got {unknown}")
    values = {**PRESETS[name], **overrides}
    if overrides.get("layouts") is not None and "local_window" not in overrides:
        del values["local_window"]
    if mhsa:
        given = [field for field in ("num_global_heads", "layouts") if overrides.get(field) is not None]
        if given:
            raise ValueError(
                f"mhsa makes all heads global and does not go with {given[0]}={overrides[given[0]]!r}"
            )
        values["num_global_heads"] = values["num_attention_heads"]
    return LongShortConfig(**values)
