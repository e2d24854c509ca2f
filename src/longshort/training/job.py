"""The objects that the steps of a run need: model, batches, windows for the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longshort.data import Batch, Batches, DataFolder, copying_windows, validation_windows
from longshort.distributed import keep_exchanges
from longshort.model import LongShortForCausalLM
from longshort.stability import AttentionMonitor, QKClip, UpdateEntropy
from longshort.training.parallel import Ranks
from longshort.training.run import RunConfig
from longshort.training.sharding import initialise

_COPYING_WINDOWS = 8

PrepareModel = Callable[[LongShortForCausalLM], None]
"""A function that changes a model in place before it is trained."""


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

    def make_clip(self) -> tuple[QKClip, AttentionMonitor] | tuple[None, None]:
        """Make QK-clip, if the settings ask for it, and a monitor that measures only what it needs."""
        threshold = self.run.training.qk_clip
        if threshold is None:
            return None, None
        return QKClip(self.model, threshold), AttentionMonitor(self.model, None)

    def make_monitor(self) -> tuple[AttentionMonitor, UpdateEntropy | None]:
        """Make the monitor that the settings ask for, and what measures the updates of its heads."""
        settings = self.run.training
        measures_updates = settings.alarms or settings.alarm == "update"
        update_entropy = UpdateEntropy(self.model) if measures_updates else None
        ranges = settings.monitor_row_range or settings.alarms or settings.alarm == "row-range"
        monitor = AttentionMonitor(self.model, self.run.band, row_range=ranges, update_entropy=update_entropy)
        return monitor, update_entropy


def prepare_job(
    run: RunConfig, data: DataFolder, ranks: Ranks, prepare_model: PrepareModel | None = None
) -> Job:
    """Build the model, let `prepare_model` change it, and open the data; no file is touched.

    Raises:
        ValueError: the settings do not fit the processes, or the data.
    """
    settings = run.training
    length = settings.sequence_length
    assert length is not None
    if settings.batch_size % ranks.data_size:
        shared = "" if ranks.context is None else f" / --context-parallel {ranks.context_size}"
        raise ValueError(
            f"--batch-size must be a multiple of the {ranks.world_size} processes{shared}, "
            f"got {settings.batch_size}"
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
    return Job(run, _prepare_model(run, ranks, prepare_model), batches, windows, copying)


def _prepare_model(run: RunConfig, ranks: Ranks, prepare: PrepareModel | None) -> LongShortForCausalLM:
    """Build the model as the ranks need it, with its initial weights."""
    is_meta = ranks.shards is not None and prepare is None  # then no rank ever holds all of it
    model = run.build_model("meta" if is_meta else "cpu")
    if prepare is not None:
        prepare(model)
    if ranks.context is not None:
        ranks.context.distribute(model)
    if ranks.shards is not None:
        ranks.shard(model)
    if is_meta:
        initialise(model, run.training.seed)
    return model


def checkpoint_activations(model: LongShortForCausalLM, *, keeps_exchanges: bool = False) -> None:
    """Recompute each layer of the model in the backward pass, but for what came from other ranks if
    `keeps_exchanges`."""
    options: dict[str, Any] = {"use_reentrant": False}
    if keeps_exchanges:
        options["context_fn"] = keep_exchanges()
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # the method's name in earlier releases of transformers 5
        model.gradient_checkpointing_enable(options)
    model.disable_input_require_grads()  # torch 2.10 cannot compile this hook for frozen embeddings
