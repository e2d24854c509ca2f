"""Model shapes by name, the paper's and one for a laptop, or from a JSON file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
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
"""Fields of `LongShortConfig` by model name. `tiny` has 257 tokens: the bytes and an end-of-text token."""

_FIELDS = {field.name for field in fields(LongShortConfig)} - {
    field.name for field in fields(PreTrainedConfig)
}


def preset(name: str, mhsa: bool = False, **overrides: Any) -> LongShortConfig:
    """Build the config of a model by name, or from a file.

    Args:
        name: a key of `PRESETS`; or the path of a JSON file (`*.json`), an object with fields of
            `LongShortConfig` that override those of the preset named by its key "preset" (default: `tiny`).
        mhsa: make all heads global, for the baseline: the same weights in number, names and shapes. This
            overrides a file's num_global_heads.
        **overrides: fields of `LongShortConfig` that override the file's.

    Raises:
        ValueError: the name or a field is not known, the file is not a JSON object, mhsa contradicts the
            fields, or the config refuses them; the message names what is wrong.
        FileNotFoundError: there is no such file.
    """
    base, in_file = _read_file(Path(name)) if name.endswith(".json") else (name, {})
    if base not in PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(PRESETS)}, or the path of a JSON file (*.json), got {base!r}"
        )
    _require_fields("overrides", overrides)
    changes = {**in_file, **overrides}
    values = {**PRESETS[base], **changes}
    if changes.get("layouts") is not None and "local_window" not in changes:
        del values["local_window"]
    if mhsa:
        for field, source in (("num_global_heads", overrides), ("layouts", changes)):
            if source.get(field) is not None:
                raise ValueError(
                    f"mhsa makes all heads global and does not go with {field}={source[field]!r}"
                )
        values["num_global_heads"] = values["num_attention_heads"]
    return LongShortConfig(**values)


def _read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Read the preset that a file names, and its fields of `LongShortConfig`."""
    if not path.is_file():
        raise FileNotFoundError(f"preset: there is no file {str(path)!r}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"preset: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"preset: {path} must hold a JSON object, got {type(content).__name__}")
    base = content.pop("preset", "tiny")
    if not isinstance(base, str) or base not in PRESETS:
        raise ValueError(f"preset in {path} must be one of {', '.join(PRESETS)}, got {base!r}")
    _require_fields(f"keys of {path}", content)
    return base, content


def _require_fields(name: str, values: dict[str, Any]) -> None:
    unknown = sorted(values.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"{name} must be fields of LongShortConfig {sorted(_FIELDS)}, got {unknown}")
