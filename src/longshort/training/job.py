"""The objects that the steps of a run need: model, batches, windows for the validation loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longshort.data import Batch, Batches, DataFolder, copying_windows, validation_windows
from longshort.model import LongShortForCausalLM
from longshort.training.parallel import Ranks
from longshort.training.run import RunConfig

_COPYING_WINDOWS = 8


@dataclass(frozen=True)
class Job:
    """The objects that the steps of a run need, built before its folder is touched."""

    run: RunConfig
    model: LongShortForCausalLM
    batches: Batches
    windows: Batch | None
    """Windows for the validation loss; None if it is not measured."""
    copying: Batch | None = None
    """Windows for the loss of copying; None if it is not measured."""


def prepare_job(run: RunConfig, data: DataFolder, ranks: Ranks) -> Job:
    """Build the model and open the data; no file is touched.

    Raises:
        ValueError: the settings do not fit the processes, or the data.
    """
    settings = run.training
    length = settings.sequence_length
    assert length is not None
    if settings.batch_size % ranks.world_size:
        raise ValueError(
            f"--batch-size must be a multiple of the {ranks.world_size} processes, got {settings.batch_size}"
        )
    order: dict[str, Any] = {
        "token_order": settings.token_order,
        "interleave": settings.interleave,
        "document_start": run.document_start,
    }
    windows = None
    validation_length = min(length, len(data.validation.tokens) - 1)
    if settings.token_order != "text":
        validation_length = length  # a shorter window has its tokens in another order
    if settings.evaluate_every and validation_length > 0:
        windows = validation_windows(data.validation, validation_length, settings.validation_windows, **order)
    copying = (
        copying_windows(data.validation, length, _COPYING_WINDOWS) if settings.probe and length >= 4 else None
    )
    batches = Batches(data.train, length, settings.batch_size, settings.seed, **order)
    return Job(run, run.build_model(), batches, windows, copying)


def checkpoint_activations(model: LongShortForCausalLM) -> None:
    """Recompute each layer of the model in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # the method's name in earlier releases of transformers 5
        model.gradient_checkpointing_enable({"use_reentrant": False})
