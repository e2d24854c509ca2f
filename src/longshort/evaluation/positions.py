"""The longest sequence that a model takes, by its config and its table of positions."""

from __future__ import annotations

from typing import Any

from torch import nn

_PADDING_ROWS = 2  # OPT's table begins with rows of its own


def position_limit(model: Any) -> int | None:
    """Return the most tokens that the model's learned positions allow; None if it has no such table.

    In models of other makers, a table of positions is an embedding, other than that of the tokens, with
    `config.max_position_embeddings` rows.
    """
    config = model.config
    if hasattr(config, "position_embedding"):
        kinds = {config.position_embedding, getattr(config, "global_position_embedding", None)}
        return config.max_position_embeddings if "learned" in kinds else None
    limit = longest_input(model)
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if limit is None or get_embeddings is None:
        return None
    tokens = get_embeddings()
    tables = (
        module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens
    )
    is_learned = any(table.num_embeddings in range(limit, limit + _PADDING_ROWS + 1) for table in tables)
    return limit if is_learned else None


def longest_input(model: Any) -> int | None:
    """Return the number of tokens that the model was made for, `config.max_position_embeddings`; None if its
    config gives no such number."""
    limit = getattr(decoder_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def decoder_config(model: Any) -> Any:
    """Return the config of a model's decoder, a part of that of a model which also sees or hears."""
    get_text_config = getattr(model.config, "get_text_config", None)
    return model.config if get_text_config is None else get_text_config(decoder=True)
