"""Measurements that a report compares before and after a conversion: losses, latency, needles, text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from longshort.conversion.losses import token_losses
from longshort.evaluation import measure_needle
from longshort.evaluation.generation import cache_bytes
from longshort.huggingface import layouts_of, split_cache
from longshort.huggingface.cache_name import CACHE_NAME

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor
    from transformers import PreTrainedModel

    from longshort.huggingface.loading import Pretrained

_POSITION_BINS = 16
_PREFILL = 1024


@torch.no_grad()
def measure_losses(model: PreTrainedModel, windows: Int64[Tensor, "count length"]) -> dict[str, Any]:
    """Measure the loss on windows, each read alone from its first token on.

    Returns:
        `loss`, the mean over all tokens but the first of each window, nats per token; `tokens`, their
        number; `by_position`, means over ranges of positions of the token, `first` and `last` included.
    """
    losses = torch.stack([token_losses(model, window).double().cpu() for window in windows])
    by_position = losses.mean(0)
    edges = torch.logspace(0, torch.log10(torch.tensor(losses.shape[1] + 1.0)).item(), _POSITION_BINS + 1)
    bounds = sorted({min(round(edge), losses.shape[1] + 1) for edge in edges.tolist()})
    return {
        "loss": losses.mean().item(),
        "tokens": losses.numel(),
        "by_position": [
            {"first": first, "last": after - 1, "loss": by_position[first - 1 : after - 1].mean().item()}
            for first, after in pairwise(bounds)
        ],
    }


@torch.no_grad()
def measure_latency(
    model: PreTrainedModel, prompt: Int64[Tensor, " length"], new_tokens: int
) -> dict[str, float]:
    """Measure how long a token takes after a prompt, and the size of the cache then.

    Returns:
        `seconds_per_token`, the median over the new tokens; `cache_bytes`, of keys and values.
    """
    cache: Any = DynamicCache(config=model.config) if layouts_of(model) is None else split_cache(model)
    ids = prompt.to(model.device)[None]
    logits = None
    for part in ids.split(_PREFILL, dim=1):
        logits = model(input_ids=part, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1:]
    assert logits is not None
    seconds = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        logits = model(input_ids=logits.argmax(-1), use_cache=True, **{CACHE_NAME: cache}).logits
        logits.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return {"seconds_per_token": median(seconds), "cache_bytes": cache_bytes(cache)}


def measure_needles(
    pretrained: Pretrained,
    tokens: Int64[Tensor, " tokens"],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
) -> list[dict[str, Any]]:
    """Measure retrieval by length and depth, see `longshort.evaluation.measure_needle`."""
    result = measure_needle(
        pretrained.model,
        pretrained.tokenizer,
        tokens.numpy(),
        lengths=list(lengths),
        depths=list(depths),
        samples=samples,
    )
    return [vars(cell) for cell in result.cells]


@torch.no_grad()
def continue_greedily(pretrained: Pretrained, prompt: Int64[Tensor, " length"], new_tokens: int) -> str:
    """Continue a prompt with the likeliest tokens, by `generate()`; return the text after it."""
    ids = prompt.to(pretrained.model.device)[None]
    model: Any = pretrained.model
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pretrained.tokenizer.eos_token_id,
    )
    return str(pretrained.tokenizer.decode(made[0, len(prompt) :]))
