"""Model cards of converted and healed models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longshort import __version__
from longshort.huggingface import Measurement, write_model_card
from longshort.huggingface.model_card import known_facts
from longshort.training.model_card import public_name

if TYPE_CHECKING:
    from longshort.conversion.converting import Conversion
    from longshort.conversion.healing import Healing, HealSettings

_SPLIT = "held-out"


def write_conversion_card(
    out: Path, model: Any, source: str, text: str, conversion: Conversion | None
) -> bool:
    """Write OUT/README.md, see `write_model_card`; return whether it was written.

    Args:
        out: folder of the converted model.
        model: the converted model.
        source: folder of the original, or its name on the Hub. A card in the folder gives license and base
            model.
        text: source of the text that was measured on.
        conversion: the measurements; None: there are none.
    """
    data = public_name(text)
    losses = {} if conversion is None else conversion.losses
    measurements = [
        Measurement(
            f"loss (nats per token) in windows of {length:,} tokens",
            both[state]["loss"],
            of,
            "loss",
            data,
            _SPLIT,
        )
        for length, both in losses.items()
        for state, of in (("after", None), ("before", "the original"))
    ]
    training = [("weights", "those of the original; only the attention was changed, by longshort convert")]
    facts = replace(known_facts(source), training=training, measurements=measurements)
    return write_model_card(model, out, facts)


def write_healing_card(settings: HealSettings, model: Any, text: str, healing: Healing) -> bool:
    """Write MODEL/README.md, see `write_model_card`; return whether it was written.

    Args:
        settings: of the healing.
        model: the healed model.
        text: source of the training text.
        healing: how it went.
    """
    data, name = public_name(text), "loss (nats per token) in windows of "
    name += f"{settings.sequence_length:,} tokens"
    losses = [(healing.healed.last_held_out, None), (healing.original, "the original")]
    losses.append((healing.healed.lines[0]["held_out_loss"], "the converted model before the training"))
    if healing.reference is not None:
        losses.append((healing.reference.last_held_out, "the original, trained as long"))
    recipe = settings.recipe
    optional = {
        "trained factors (LoRA) of rank": settings.lora,
        "share of a teacher's logits in the loss": recipe.distill_weight or None,
    }
    training = [
        ("weights", "those of the original, trained by longshort heal after longshort convert"),
        ("text", data),
        ("optimizer steps", f"{healing.healed.step:,}"),
        ("sequences per step", f"{settings.batch_size:,}"),
        ("tokens per sequence", f"{settings.sequence_length:,}"),
        ("optimizer", "AdamW, without decay"),
        ("largest learning rate", f"{recipe.learning_rate:g}"),
        *((entry, str(value)) for entry, value in optional.items() if value is not None),
        ("precision", "fp32"),
        ("seed", str(settings.seed)),
        ("trained with", f"longshort {__version__}, torch {torch.__version__}"),
    ]
    measurements = [Measurement(name, loss, of, "loss", data, _SPLIT) for loss, of in losses]
    facts = replace(known_facts(settings.model), training=training, measurements=measurements)
    return write_model_card(model, settings.model, facts)
