"""The rounding audit of a run: the errors of its gradients in each precision of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from longshort.data import Batches, DataFolder
from longshort.stability.rounding import AUDITED, audit_rounding, precision_refusal
from longshort.training.optimization import batch_loss
from longshort.training.parallel import Ranks
from longshort.training.trained import TrainedModel

Split = Literal["train", "validation"]


def audit_trained(
    trained: TrainedModel,
    data: DataFolder,
    *,
    split: Split = "train",
    batches: int = 8,
    batch_size: int | None = None,
    seed: int = 0,
    precisions: Sequence[str] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Measure what each precision of attention does to the gradients of a trained model.

    Batches are drawn and losses computed as in the training. Nothing of the run or its model is changed.

    Args:
        trained: the model, on any device.
        data: folder of the run's data.
        split: where the batches come from.
        batches: number of batches, at least 2.
        batch_size: sequences per batch; None: those of a forward pass of one process of the training.
        seed: names the batches.
        precisions: see `audit_rounding`; None: fp32, bf16, bf16-flash and, if the run allows it, sdpa-bf16.
        progress: called with the number of batches done, and of all.

    Returns:
        JSON: the settings; `left_out`, by precision why it was not measured; and `errors`, a list of
        `GradientError` as dictionaries, where a number that is not finite remains so (`strict_json` writes
        null).

    Raises:
        ValueError: a setting is out of its range, a precision does not go with the run, or the split is
            shorter than one sequence.
    """
    run, model = trained.config, trained.model
    settings = run.training
    assert settings.sequence_length is not None
    left_out: dict[str, str] = {}
    if precisions is None:
        refusals = {name: _refusal(trained, name) for name in AUDITED}
        left_out = {name: reason for name, reason in refusals.items() if reason is not None}
        precisions = [name for name in AUDITED if name not in left_out]
    for name in precisions:
        reason = _refusal(trained, name)
        if reason is not None:
            raise ValueError(reason)
    size = (settings.micro_batch_size or settings.batch_size) if batch_size is None else batch_size
    drawn = Batches(
        data.train if split == "train" else data.validation,
        settings.sequence_length,
        size,
        seed,
        token_order=settings.token_order,
        interleave=settings.interleave,
        document_start=run.document_start,
    )
    ranks = Ranks(model.device)
    errors = audit_rounding(
        model,
        lambda batch: batch_loss(model, batch, settings, ranks),
        [drawn.batch(step) for step in range(batches)],
        precisions,
        progress,
    )
    return {
        "step": trained.step,
        "split": split,
        "batches": batches,
        "batch_size": size,
        "sequence_length": settings.sequence_length,
        "seed": seed,
        "precision": settings.precision,
        "attention_precision": settings.attention_precision,
        "left_out": left_out,
        "errors": [asdict(error) for error in errors],
    }


def _refusal(trained: TrainedModel, precision: str) -> str | None:
    """Return why the run's model cannot compute attention in a precision, or None."""
    if precision == "sdpa-bf16" and trained.config.training.separate_documents:
        return (
            "attention_precision 'sdpa-bf16' does not go with --separate-documents: PyTorch's flash kernel "
            "has no segments"
        )
    return precision_refusal(trained.model, precision)
