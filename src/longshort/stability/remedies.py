"""Remedies against large logits that act on the training, not on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longshort.attention import require_tensor
from longshort.checks import require_positive
from longshort.layers import LongShortAttention
from longshort.stability.ranks import own_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_IGNORED = -100  # torch's label of a position that nothing is predicted for


def z_loss(
    logits: Float[Tensor, "*positions vocab"], labels: Int[Tensor, "*positions"] | None = None
) -> Float[Tensor, ""]:
    """Average logsumexp(logits)² over the predicted tokens; it keeps the softmax's normaliser near 1.

    PaLM (Chowdhery et al. 2022) adds 1e-4 of it to the cross-entropy. It acts on the logits over the
    vocabulary, not on those of the attention.

    Args:
        logits: any floating dtype; computed in fp32.
        labels: the token that each position predicts; -100: none, the position does not count. None: all
            positions count.

    Returns:
        A scalar in fp32; 0 where nothing is predicted.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the shapes do not fit.
    """
    require_tensor("logits", logits)
    squares = logits.float().logsumexp(-1).square()
    if labels is None:
        return squares.sum() / max(1, squares.numel())
    require_tensor("labels", labels)
    if labels.shape != squares.shape:
        raise ValueError(
            f"labels must have the shape of logits without its last dimension, {tuple(squares.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    counts = labels != _IGNORED
    return squares.masked_fill(~counts, 0.0).sum() / counts.sum().clamp_min(1)


def scale_qk_learning_rate(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let the query and key projections learn at `factor` times the rate of their parameter group.

    Smaller steps of W_Q and W_K change the attention logits more slowly, as in Anson and Aitchison 2025
    (arXiv 2511.21377), where the factor depends on the weights; here it is constant. From now on, each
    `optimizer.step()` moves the rows of queries and keys of every qkv_proj.weight only `factor` of the way;
    the rows of values move all of it. Up to rounding, that is the optimizer with another rate for these rows,
    weight decay included, since the updates of SGD, Adam and AdamW are linear in the rate. The optimizer's
    state does not hold the factor: another optimizer, to which the state is loaded, needs this call too.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scale_qk_learning_rate(model, optimizer, 0.1)

    Args:
        model: holds `LongShortAttention` layers.
        optimizer: holds their qkv_proj.weight, and updates it by a multiple of the learning rate.
        factor: > 0; a second call for the same optimizer multiplies the factors.

    Raises:
        ValueError: factor is not finite and > 0; the model has no such layer, or one whose weight the
            optimizer does not hold.
    """
    require_positive("factor", factor)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    projections: dict[int, tuple[Tensor, int]] = {}  # by identity: layers may share a weight
    for layer in _attention_layers(model):
        weight, layout = layer.qkv_proj.weight, layer.layout
        if id(weight) not in held:
            raise ValueError(f"optimizer must hold qkv_proj.weight of all layers, got one without {layer}")
        projections[id(weight)] = weight, (layout.num_heads + layout.num_kv_heads) * layer.head_dim

    before: list[Tensor] = []

    def rows() -> list[Tensor]:
        parts = ((own_rows(weight.detach()), count) for weight, count in projections.values())
        return [own[: max(0, count - start)] for (own, start), count in parts]

    def remember(*_: object) -> None:
        before[:] = [part.clone() for part in rows()]

    def go_part_of_the_way(*_: object) -> None:
        for new, old in zip(rows(), before, strict=True):
            new.copy_(torch.lerp(old, new, factor))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(go_part_of_the_way)


def _attention_layers(model: nn.Module) -> list[LongShortAttention]:
    layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
    if not layers:
        raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
    return layers


class QKClip:
    """QK-clip of Kimi K2 (Moonshot AI 2025, arXiv 2507.20534): after an optimizer step, a head whose largest
    logit m was above the threshold τ gets smaller weights, so that the same input would give it τ.

    If a query head shares its key head with no other, its query and key rows of qkv_proj are scaled by
    sqrt(τ/m) each. If query heads share a key head, only the query rows are scaled, by τ/m: the shared keys,
    and so the other heads, stay as they are, as K2 leaves its shared rotary keys. A single factor for all
    heads that share the keys would shrink healthy heads for the sake of one. Weights of heads at or below the
    threshold keep every bit, and so do those of a head whose logit is not finite.

    A logit is linear in these rows with rotation or a short convolution too; it is measured before softcap
    and ALiBi.

        clip = QKClip(model, 100.0)
        with monitor.observing():
            loss.backward()
        optimizer.step()
        clip.apply(monitor.reading().max_logit_by_head)

    Args:
        model: holds `LongShortAttention` layers; layers are counted in the order of `model.modules()`.
        threshold: τ, > 0; K2 has 100.

    Raises:
        ValueError: threshold is not finite and > 0; the model has no such layer, or one with QK-norm, which
            undoes any scaling.
    """

    def __init__(self, model: nn.Module, threshold: float):
        require_positive("threshold", threshold)
        self._threshold = threshold
        self._layers = _attention_layers(model)
        if any(layer.q_norm is not None for layer in self._layers):
            raise ValueError(
                "model must have no QK-norm, which undoes scaling of queries and keys, got a layer with it"
            )

    def apply(self, max_logit_by_head: Sequence[Sequence[float]]) -> int:
        """Scale the weights in place.

        Args:
            max_logit_by_head: for each layer one number per query head, as in `Reading`, measured in the
                passes of the step.

        Returns:
            The number of query heads that were scaled.

        Raises:
            ValueError: the numbers are not those of the model's heads.
        """
        return int(self.apply_on_device([torch.tensor(x, dtype=torch.float64) for x in max_logit_by_head]))

    @torch.no_grad()
    def apply_on_device(self, max_logit_by_head: Sequence[Tensor]) -> Tensor:
        """Do as `apply` does, with tensors on the devices of the weights, as `Measurements` has them; a GPU
        is not waited for.

        Returns:
            The number of query heads that were scaled, a scalar on the first layer's device.
        """
        wanted = [layer.layout.num_heads for layer in self._layers]
        found = [len(layer) for layer in max_logit_by_head]
        if found != wanted:
            raise ValueError(f"max_logit_by_head must have {wanted} heads by layer, got {found}")
        counts = []
        for layer, max_logits in zip(self._layers, max_logit_by_head, strict=True):
            has_own_keys = layer.layout.group_size == 1
            max_logits = max_logits.to(layer.qkv_proj.weight.device)
            is_clipped = (max_logits > self._threshold) & (max_logits < torch.inf)  # false for NaN too
            factors = torch.where(is_clipped, self._threshold / max_logits, 1.0)
            factors = factors.sqrt().repeat(2) if has_own_keys else factors
            own, start = own_rows(layer.qkv_proj.weight)  # a view
            precise = torch.promote_types(own.dtype, torch.float32)
            factors = factors.to(precise).repeat_interleave(layer.head_dim)[start : start + len(own)]
            own[: len(factors)] *= factors[:, None]  # 1 keeps every bit
            counts.append(is_clipped.sum())
        return torch.stack([count.to(counts[0].device) for count in counts]).sum()
