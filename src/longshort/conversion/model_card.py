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
    from collections.abc import Sequence

    from longshort.conversion.converting import Conversion

_SPLIT = "held-out"


def write_conversion_card(
    out: Path, model: Any, source: str, text: str, conversion: Conversion | None
) -> bool:
    """Write OUT/README.md, see `write_model_card`; return whether it was written.

    Args:
        out: folder of the converted model.
        model: the converted model.
        source: folder of the original, or its name on the Hub. A card in the folder gives the license and
            the datasets.
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
    # the original's card names the base of the original, not of this model
    facts = replace(known_facts(source), base_model=None, training=training, measurements=measurements)
    return write_model_card(model, out, facts)


def write_healing_card(
    folder: Path,
    model: Any,
    text: str,
    length: int,
    losses: Sequence[tuple[float, str | None]],
    training: Sequence[tuple[str, str]],
) -> bool:
    """Write README.md of a healed model, see `write_model_card`; return whether it was written.

    Args:
        folder: its folder. The card there gives license and base model.
        model: the healed model.
        text: source of the text that it was trained on.
        length: tokens of a held-out window.
        losses: on held-out windows, each with what it is of; None: of the healed model.
        training: names and values of the settings.
    """
    data, name = public_name(text), f"loss (nats per token) in windows of {length:,} tokens"
    facts = replace(
        known_facts(folder),
        training=[
            ("weights", "those of the original, trained by longshort heal after longshort convert"),
            ("text", data),
            *training,
            ("trained with", f"longshort {__version__}, torch {torch.__version__}"),
        ],
        measurements=[Measurement(name, loss, of, "loss", data, _SPLIT) for loss, of in losses],
    )
    return write_model_card(model, folder, facts)
