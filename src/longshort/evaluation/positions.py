"""The longest sequence that a model takes."""

from __future__ import annotations

from typing import Any


def position_limit(model: Any) -> int | None:
    """Return the most tokens that the model's learned positions allow; None if it has no such table."""
    config = model.config
    kinds = {getattr(config, "position_embedding", None), getattr(config, "global_position_embedding", None)}
    return config.max_position_embeddings if "learned" in kinds else None
