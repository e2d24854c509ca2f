"""Comparison of a model with its config, either of which may have changed since the model was built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from longshort.layers import LongShortAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_own_config(model: PreTrainedModel) -> None:
    """Raise a ValueError unless a new model of the config would have the parameters and layers of this one.

    No memory is allocated. Parameters that other tools have added to the model, or removed, are ignored.
    """
    with torch.device("meta"):
        wanted, found = _facts(type(model)(model.config)), _facts(model)
    layers = {name for facts in (wanted, found) for name, fact in facts.items() if isinstance(fact, dict)}
    for name in [*sorted(layers), *wanted.keys() & found.keys()]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"config must describe the model that is saved, whose {name} is {found.get(name)}, got "
                f"one of {wanted.get(name)}; change a config before a model is built of it"
            )


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """Collect what a config determines: settings of layers, and the names and shapes of parameters."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LongShortAttention)}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is embedding.weight
    settings = {name: layer.settings for name, layer in layers.items()}
    has_positions = any(name.endswith("embed_positions.weight") for name in shapes)
    return {**settings, **shapes, "tie_word_embeddings": is_tied, "table of positions": has_positions}
