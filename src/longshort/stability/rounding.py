"""An audit of rounding: the error of the gradients of queries and keys in each precision of attention.

A rounding error that differs from batch to batch averages out like the noise of small batches; one with a
common part drives the weights the same way in every step. So the two are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longshort.checks import require_integer
from longshort.flash import flash_refusal
from longshort.layers import ATTENTION_PRECISIONS, LongShortAttention

AUDITED = ("fp32", "bf16", "bf16-flash", "sdpa-bf16")
"""The precisions that differ in what they round."""

TRUTH = "fp64"

_Batch = TypeVar("_Batch")


@dataclass(frozen=True)
class GradientError:
    """The error of a weight gradient in a precision of attention, over several batches.

    Here g is the gradient of a batch, r the same with attention in fp64 and all else alike, e = g - r.

    Attributes:
        precision: precision of the attention of all layers.
        layer: layer of the weights, counted in the order of `model.modules()`.
        matrix: "q" or "k", rows of `qkv_proj.weight`.
        bias: mean over batches of <e, r>/|r|²; > 0 if the gradient is too long.
        bias_error: standard error of bias.
        noise: sqrt(mean |e - mean e|²) / |mean r|.
        mean_error: |mean e|, divided by what it would be on average if the errors of batches were independent
            and had no common part: the standard error sqrt(sum |e - mean e|² / (N·(N - 1))) of N batches. So
            it is about 1 if there is only noise.
    """

    precision: str
    layer: int
    matrix: str
    bias: float
    bias_error: float
    noise: float
    mean_error: float


class ErrorSums:
    """Sums over batches from which the error of one gradient follows."""

    def __init__(self) -> None:
        self._batches = 0
        self._biases: list[Tensor] = []
        self._mean: Tensor | float = 0.0
        self._mean_reference: Tensor | float = 0.0
        self._deviations: Tensor | float = 0.0

    def add(self, gradient: Tensor, reference: Tensor) -> None:
        """Add a batch: a gradient and its reference, of any equal shape."""
        true = reference.double()
        error = gradient.double() - true
        self._batches += 1
        self._biases.append((error * true).sum() / true.square().sum())
        before = error - self._mean  # Welford's updates, which do not cancel if all errors are alike
        self._mean = self._mean + before / self._batches
        self._deviations = self._deviations + (before * (error - self._mean)).sum()
        self._mean_reference = self._mean_reference + (true - self._mean_reference) / self._batches

    def error(self, precision: str, layer: int, matrix: str) -> GradientError:
        """Return the error; at least two batches were added. Numbers that have no meaning are NaN."""
        count = self._batches
        biases = torch.stack(self._biases)
        assert count >= 2 and isinstance(self._mean, Tensor) and isinstance(self._mean_reference, Tensor)
        deviations = float(self._deviations)
        return GradientError(
            precision,
            layer,
            matrix,
            bias=biases.mean().item(),
            bias_error=biases.std().item() / math.sqrt(count),
            noise=_ratio(math.sqrt(deviations / count), self._mean_reference.norm().item()),
            mean_error=_ratio(self._mean.norm().item(), math.sqrt(deviations / (count * (count - 1)))),
        )


def audit_rounding(
    model: nn.Module,
    loss: Callable[[_Batch], Tensor],
    batches: Sequence[_Batch],
    precisions: Sequence[str] = AUDITED,
    progress: Callable[[int, int], Any] | None = None,
) -> list[GradientError]:
    """Compare the gradients of queries and keys in several precisions of attention with those in fp64.

    All layers compute attention in the precision; all else is as `loss` computes it. The model's weights,
    gradients and settings are as before in the end.

    Args:
        model: holds `LongShortAttention` layers.
        loss: computes the loss of a batch by the model, a scalar.
        batches: at least two.
        precisions: names of `longshort.layers.ATTENTION_PRECISIONS`.
        progress: called with the number of batches done, and of all.

    Returns:
        An error for each precision, layer and matrix, in this order.

    Raises:
        ValueError: the model has no such layer, a precision is unknown or does not go with a layer, or there
            are too few batches.
    """
    layers = _attention_layers(model)
    require_integer("the number of batches", len(batches), minimum=2)
    if not precisions:
        raise ValueError(f"precisions must be some of {ATTENTION_PRECISIONS}, got none")
    for precision in precisions:
        if precision not in ATTENTION_PRECISIONS:
            raise ValueError(f"precisions must be some of {ATTENTION_PRECISIONS}, got {precision!r}")
        refused = precision_refusal(model, precision)
        if refused is not None:
            raise ValueError(refused)
    names = list(dict.fromkeys(precisions))
    sums = {name: [{"q": ErrorSums(), "k": ErrorSums()} for _ in layers] for name in names}
    for done, batch in enumerate(batches):
        references = _gradients(layers, TRUTH, loss, batch)
        for name in names:
            gradients = _gradients(layers, name, loss, batch)
            for layer, gradient, reference in zip(sums[name], gradients, references, strict=True):
                for matrix, found in layer.items():
                    found.add(gradient[matrix], reference[matrix])
        if progress is not None:
            progress(done + 1, len(batches))
    return [
        found.error(name, index, matrix)
        for name in names
        for index, layer in enumerate(sums[name])
        for matrix, found in layer.items()
    ]


def precision_refusal(model: nn.Module, precision: str) -> str | None:
    """Return why a layer of the model cannot compute attention in a precision, or None."""
    if precision != "sdpa-bf16":
        return None
    for layer in _attention_layers(model):
        settings = layer.settings
        names = ("layout", "softcap", "alibi_slopes", "sink_logits")
        refused = flash_refusal(**{name: settings[name] for name in names})
        if refused is not None:
            return refused
    return None


def _attention_layers(model: nn.Module) -> list[LongShortAttention]:
    layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
    if not layers:
        raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
    return layers


def _gradients(
    layers: Sequence[LongShortAttention], precision: str, loss: Callable[[_Batch], Tensor], batch: _Batch
) -> list[dict[str, Tensor]]:
    """Compute the gradients of each layer's rows of queries and keys."""
    with _attention_in(layers, precision):
        weights = [layer.qkv_proj.weight for layer in layers]
        gradients = torch.autograd.grad(loss(batch), weights)
    parts = []
    for layer, gradient in zip(layers, gradients, strict=True):
        heads = [layer.layout.num_heads, layer.layout.num_kv_heads, layer.layout.num_kv_heads]
        q, k, _ = gradient.split([count * layer.head_dim for count in heads])
        parts.append({"q": q, "k": k})
    return parts


@contextmanager
def _attention_in(layers: Sequence[LongShortAttention], precision: str) -> Iterator[None]:
    before = [layer.attention_precision for layer in layers]
    try:
        for layer in layers:
            layer.attention_precision = precision
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.attention_precision = own


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit else math.nan
