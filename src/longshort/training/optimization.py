"""One optimizer step: loss, gradient, clipping, AdamW, learning rate; and the loss for validation.

Nothing of a step is read back to the host, which so gives a GPU the next step while it computes this one.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from longshort.convolution import ShortConvolution
from longshort.data import Batch
from longshort.stability import scale_qk_learning_rate, z_loss
from longshort.stability.ranks import whole
from longshort.training.config import TrainConfig
from longshort.training.parallel import Ranks
from longshort.training.sharding import reshard

_IGNORED = -100  # torch's label of a position that nothing is predicted for


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


class Objective(nn.Module):
    """The function whose gradient a step follows: a model with its losses.

    `--compile` compiles it: forward pass, losses and, by them, the backward pass are one graph each, which
    serve all steps alike. Clipping and AdamW are not among them: they are a few kernels over all parameters
    already, and the learning rate would be a constant of a graph.

    Args:
        model: the model, which keeps its parameters.
        settings: `precision`, `separate_documents` and `z_loss` are read.
    """

    def __init__(self, model: nn.Module, settings: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._uses_bf16 = settings.precision == "bf16"
        self._separates_documents = settings.separate_documents
        self._z_loss = settings.z_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None = None,
        label_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of the labels, nats per token, and what is differentiated, which is
        the same without a z-loss; scalars.

        The first three arguments are those of a `Batch` on the model's device. Where ranks share sequences,
        they are this rank's part, with its positions, and the sums are divided by `label_count`, all labels
        by the ranks, so that the mean over ranks is that of all labels.
        """
        is_cast = self._uses_bf16
        if label_count is None and not self._separates_documents:
            segment_ids = None
        shared = {} if label_count is None else {"num_items_in_batch": label_count}
        with torch.autocast(input_ids.device.type, torch.bfloat16) if is_cast else nullcontext():
            output = self.model(
                input_ids,
                position_ids=position_ids,
                shift_labels=labels,
                segment_ids=segment_ids,
                use_cache=False,
                **shared,
            )
        if not self._z_loss:
            return output.loss, output.loss
        weight = self._z_loss
        if label_count is not None:
            weight = weight * (labels != _IGNORED).sum() / label_count
        return output.loss, output.loss + weight * z_loss(output.logits, labels)


def optimizer_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: float,
    settings: TrainConfig,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Take one step on this rank's part of a batch.

    Args:
        objective: an `Objective`, or what wraps it for the ranks.
        optimizer: holds its parameters.
        batch: this rank's part, on the CPU.
        learning_rate: the learning rate of this step.
        settings: the settings of the run.
        ranks: the processes.

    Returns:
        The mean cross-entropy over that part, and the norm of the gradient of what is differentiated (with
        the z-loss, if there is one) over all ranks, before clipping; scalars.
    """
    size = len(batch.input_ids)
    parts = _micro_batches(batch, settings, ranks)
    total = torch.zeros((), device=ranks.device)
    optimizer.zero_grad(set_to_none=True)
    for index, part in enumerate(parts):
        with (
            ranks.accumulating(objective, is_last=index == len(parts) - 1),
            ranks.on_device(part, separate_documents=settings.separate_documents) as inputs,
        ):
            loss, differentiated = objective(*inputs)
            share = len(part.input_ids) / size
            (differentiated * share).backward()
        total += loss.detach() * share
    parameters = list(objective.parameters())
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if settings.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return total, norm


def batch_loss(model: nn.Module, batch: Batch, settings: TrainConfig, ranks: Ranks) -> Tensor:
    """Compute the mean cross-entropy of a batch's labels, nats per token; a scalar."""
    with ranks.on_device(batch, separate_documents=settings.separate_documents) as inputs:
        return Objective(model, settings)(*inputs)[0]


@torch.no_grad()
def validation_loss(objective: nn.Module, windows: Batch, settings: TrainConfig, ranks: Ranks) -> float:
    """Compute the mean cross-entropy over windows that have equally many labels, nats per token.

    Each part of the ranks takes every data_size-th micro-batch. A model that is cut into shards needs all
    ranks in every pass, so some then compute one that does not count.
    """
    parts = _micro_batches(windows, settings, ranks)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    objective.eval()
    passes = range(ranks.data_rank, len(parts), ranks.data_size)
    if ranks.shards is not None:
        passes = range(ranks.data_rank, ranks.data_size * -(-len(parts) // ranks.data_size), ranks.data_size)
    for index in passes:
        part = parts[min(index, len(parts) - 1)]
        with ranks.on_device(part, separate_documents=settings.separate_documents) as inputs:
            loss = objective(*inputs)[0].double()
        if index < len(parts):
            total += loss * len(part.input_ids)
    objective.train()
    if ranks.shards is not None:
        reshard(objective)
    return ranks.reduce_sum(total).item() / len(windows.input_ids) / ranks.context_size


def _micro_batches(batch: Batch, settings: TrainConfig, ranks: Ranks) -> list[Batch]:
    """Split a batch into those of one forward pass each."""
    size = settings.micro_batch_size or settings.batch_size // ranks.data_size
    split = (tensor.split(size) for tensor in batch)
    return [Batch(*parts) for parts in zip(*split, strict=True)]
