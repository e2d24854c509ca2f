"""One optimizer step: loss, gradient, clipping, AdamW, learning rate; and the loss for validation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from longshort.convolution import ShortConvolution
from longshort.data import Batch
from longshort.stability import scale_qk_learning_rate, z_loss
from longshort.training.config import TrainConfig
from longshort.training.parallel import Ranks


def learning_rate_at(settings: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    Linear warm-up to `learning_rate` over `warmup_steps`; then, for the constant schedule, no change; for
    cosine a half cosine down to `min_learning_rate` at `schedule_steps`, where it stays; for wsd (warm-up,
    stable, decay) no change but a line down to `min_learning_rate` over the last `decay_steps` of the
    schedule.
    """
    warmup_steps, schedule_steps, lowest = settings.schedule_or_defaults()
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / (warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "wsd":
        left = min(1.0, max(0, schedule_steps - step) / settings.decay_or_default())
        return lowest + (settings.learning_rate - lowest) * left
    done = min(1.0, (step - warmup_steps) / (schedule_steps - warmup_steps))
    return lowest + (settings.learning_rate - lowest) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW that decays matrices, including embeddings, but no gains, sink logits or convolutions.

    Convolutions start as the identity, and decay would shrink the attention logits. With a
    `qk_learning_rate_factor` below 1, query and key projections learn more slowly.
    """
    kept = {id(module.weight) for module in model.modules() if isinstance(module, ShortConvolution)}
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in kept else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )
    if settings.qk_learning_rate_factor != 1:
        scale_qk_learning_rate(model, optimizer, settings.qk_learning_rate_factor)
    return optimizer


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: float,
    settings: TrainConfig,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Take one step on this rank's part of a batch.

    Returns:
        The mean cross-entropy over that part, and the norm of the gradient of what is differentiated (with
        the z-loss, if there is one) over all ranks, before clipping; scalars.
    """
    size = len(batch.input_ids)
    parts = _micro_batches(batch, settings, ranks)
    total = torch.zeros((), device=ranks.device)
    optimizer.zero_grad(set_to_none=True)
    for index, part in enumerate(parts):
        with ranks.accumulating(model, is_last=index == len(parts) - 1):
            loss, objective = _loss_and_objective(model, part, settings, ranks)
            share = len(part.input_ids) / size
            (objective * share).backward()
        total += loss.detach() * share
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return total, norm


def batch_loss(model: nn.Module, batch: Batch, settings: TrainConfig, ranks: Ranks) -> Tensor:
    """Compute the mean cross-entropy of a batch's labels, nats per token; a scalar."""
    return _forward(model, batch, settings, ranks).loss


def _loss_and_objective(
    model: nn.Module, batch: Batch, settings: TrainConfig, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy, and the objective that is differentiated."""
    output = _forward(model, batch, settings, ranks)
    if not settings.z_loss:
        return output.loss, output.loss
    return output.loss, output.loss + settings.z_loss * z_loss(output.logits, batch.labels.to(ranks.device))


def _forward(model: nn.Module, batch: Batch, settings: TrainConfig, ranks: Ranks) -> Any:
    """Compute the model's output: `loss`, a scalar, and `logits` (batch, sequence, vocab)."""
    on_device = Batch(*(tensor.to(ranks.device) for tensor in batch))
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return model(
            on_device.input_ids,
            shift_labels=on_device.labels,
            segment_ids=on_device.segment_ids if settings.separate_documents else None,
            use_cache=False,
        )


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Batch, settings: TrainConfig, ranks: Ranks) -> float:
    """Compute the mean cross-entropy over windows that have equally many labels, nats per token.

    Each rank takes every world_size-th micro-batch.
    """
    parts = _micro_batches(windows, settings, ranks)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    model.eval()
    for part in parts[ranks.rank :: ranks.world_size]:
        total += batch_loss(model, part, settings, ranks).double() * len(part.input_ids)
    model.train()
    return ranks.reduce_sum(total).item() / len(windows.input_ids)


def _micro_batches(batch: Batch, settings: TrainConfig, ranks: Ranks) -> list[Batch]:
    size = settings.micro_batch_size or settings.batch_size // ranks.world_size
    return [Batch(*parts) for parts in zip(*(tensor.split(size) for tensor in batch), strict=True)]
