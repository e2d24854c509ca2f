"""Attention logits of a language model on a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longshort.checks import require_integer
from longshort.huggingface.watch import LogitMonitor
from longshort.stability import Reading

if TYPE_CHECKING:
    from jaxtyping import Int


@torch.no_grad()
def measure_logits(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    *,
    context_length: int,
    first_token: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Reading, list[str]]:
    """Measure the attention logits of a decoder of transformers on a text, in windows that follow each other.

    Args:
        model: on any device; it is left in the mode it was in.
        tokens: the tokens of the text.
        context_length: tokens in a window, the first token included; the last window may be shorter.
        first_token: is put before each window; None: none.
        batch_size: windows in a forward pass.
        progress: called after each pass with the number of tokens done, and of all.

    Returns:
        The reading, and the names of the layers in its order.

    Raises:
        ValueError: a number is out of its range, there are no tokens, or the model cannot be watched, which
            is tried on a few tokens first.
    """
    require_integer("context_length", context_length, minimum=1 if first_token is None else 2)
    require_integer("batch_size", batch_size, minimum=1)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"tokens must be at least one in a single dimension, got shape {tuple(tokens.shape)}"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    options: dict[str, Any] = {"use_cache": False}
    monitor, done = LogitMonitor(model), 0
    try:
        _require_watchable(monitor, model, tokens[None, :8].to(device))
        with monitor:
            for windows in _batches(tokens, context_length - (first_token is not None), batch_size):
                done += windows.numel()
                if first_token is not None:
                    windows = torch.cat([torch.full_like(windows[:, :1], first_token), windows], dim=1)
                model(windows.to(device), **options)
                if progress is not None:
                    progress(done, len(tokens))
    finally:
        model.train(was_training)
    names = monitor.layer_names
    return monitor.reading(), names


def _require_watchable(monitor: LogitMonitor, model: nn.Module, tokens: Tensor) -> None:
    with monitor:
        model(tokens, use_cache=False)
    try:
        monitor.reading()
    except RuntimeError as error:
        raise ValueError(f"model must be one that can be watched: {error}") from error


def _batches(tokens: Tensor, width: int, batch_size: int) -> list[Tensor]:
    """Cut tokens into (windows, width), at most batch_size windows each, and the rest."""
    whole = len(tokens) // width * width
    batches = list(tokens[:whole].view(-1, width).split(batch_size)) if whole else []
    return [*batches, tokens[None, whole:]] if whole < len(tokens) else batches
