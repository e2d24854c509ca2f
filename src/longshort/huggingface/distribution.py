"""Context parallelism for decoders with layouts: their layers attend over sequences cut across ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longshort.attention import attention
from longshort.distributed import ContextParallel, require_agreement
from longshort.huggingface.apply import attention_layers
from longshort.huggingface.interface import CONTEXT
from longshort.huggingface.state import layouts_of, text_config
from longshort.huggingface.trial import trial_logits, trial_tokens, undisturbed
from longshort.layout import HeadLayout


def distribute(model: nn.Module, context: ContextParallel) -> None:
    """Let the layers of a decoder that has layouts attend across the ranks of a context, in place.

    Each rank then passes its part of a sequence, without a cache:

        apply(model, num_global_heads=4, window=256)
        distribute(model, context)
        with context.sequence(batch, length, segment_ids):
            part = context.inputs(input_ids, labels)
            loss = model(part["input_ids"], position_ids=part["position_ids"], ..., use_cache=False)

    Packed sequences are named by the segment ids of `sequence`, not by positions that start again. All ranks
    must call it, before the model is wrapped, as by FSDP.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: it has no layouts, the layouts differ between the ranks, or tokens reach later ones by
            something else than attention, such as a short convolution or a recurrence, which has no halo.
    """
    layouts = layouts_of(model)
    if layouts is None:
        raise ValueError(f"model must have layouts, got {type(model).__name__} without; call apply first")
    require_agreement({"the layouts of the layers": layouts}, context.group, context.device)
    names = [layer.name for layer in attention_layers(model)]  # pyright: ignore[reportArgumentType]
    layers = [model.get_submodule(name.partition(" ")[0]) for name in names]  # the class follows
    _require_attention_alone(model, layers)  # pyright: ignore[reportArgumentType]
    for layer in layers:
        setattr(layer, CONTEXT, context)


@torch.no_grad()
def _require_attention_alone(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse a decoder in which a token reaches later ones though every query sees its own key alone."""
    ids = trial_tokens(model, text_config(model))
    changed, half = ids.clone(), ids.shape[1] // 2
    changed[:, :half] = ids[:, half : 2 * half]
    try:
        for layer in layers:
            setattr(layer, CONTEXT, _attend_to_itself)
        with undisturbed(model):
            model.eval()
            one, other = (trial_logits(model, x, use_cache=False)[:, half:] for x in (ids, changed))
    finally:
        gather_layers(model)
    rounding = 8 * torch.finfo(one.dtype).eps * one.abs().max()
    if (one - other).abs().max() > rounding:
        raise ValueError(
            f"model must mix tokens by attention alone to go across ranks, got {type(model).__name__}, in "
            "which another layer (a short convolution or a recurrence) does, which has no halo"
        )


def _attend_to_itself(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, **options: Any) -> Tensor:
    return attention(q, k, v, HeadLayout((1,) * layout.num_heads, layout.num_kv_heads), **options)


def gather_layers(model: nn.Module) -> None:
    """Let the layers of a decoder attend on one rank again."""
    for module in model.modules():
        if hasattr(module, CONTEXT):
            delattr(module, CONTEXT)
