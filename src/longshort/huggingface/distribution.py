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
            something else than attention, such as a short convolution or a recurrence, which has no halo; or
            whether they do cannot be shown, since the model has no finite gradients, as with some quantized
            weights.
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


def _require_attention_alone(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse a decoder in which a token reaches later ones though every query sees its own key alone.

    The gradients of later logits with respect to the embeddings of earlier tokens decide: they are exactly 0
    where no token reaches another. The logits themselves cannot, since the matrix products of a mixture of
    experts round differently beside other tokens.
    """
    name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:  # its kernels may cut gradients off silently
        raise _no_gradients(f"{name} with weights quantized by {type(quantizer).__name__}; dequantize them")
    try:
        for layer in layers:
            setattr(layer, CONTEXT, _attend_to_itself)
        with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
            model.eval()
            earlier, own = _gradients_of_later_logits(model).chunk(2)
    finally:
        gather_layers(model)
    if not earlier.isfinite().all() or not own.any():
        kind = "all 0" if earlier.isfinite().all() else "not finite"
        raise _no_gradients(f"{name}, whose gradients are {kind}")
    if earlier.any():
        raise ValueError(
            f"model must mix tokens by attention alone to go across ranks, got {name}, in which another "
            "layer (a short convolution or a recurrence) does, which has no halo"
        )


def _no_gradients(found: str) -> ValueError:
    return ValueError(
        "model must have gradients to go across ranks, which show whether it mixes tokens by attention "
        f"alone, got {found}"
    )


def _gradients_of_later_logits(model: PreTrainedModel) -> Tensor:
    """Differentiate the logits of the later half of the trial's tokens by the embeddings of all of them.

    Returns:
        (tokens, width), for random weights of the logits: their plain sum may be constant.
    """
    embeddings: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    ids = trial_tokens(model, text_config(model))
    with model.get_input_embeddings().register_forward_hook(cut):
        later = trial_logits(model, ids, use_cache=False).chunk(2, dim=1)[1]
    if not embeddings:
        raise _no_gradients(f"{type(model).__name__}, which does not call its input embeddings")
    try:
        gradients = torch.autograd.grad(later, embeddings, torch.randn_like(later))
    except Exception as error:  # the model's own code, such as a kernel without a backward pass
        raise ValueError(
            f"{type(model).__name__} cannot go across ranks: it has no gradients with respect to its input "
            f"embeddings: {error!r}"
        ) from error
    return torch.cat(gradients, dim=-1)[0]


def _attend_to_itself(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, **options: Any) -> Tensor:
    return attention(q, k, v, HeadLayout((1,) * layout.num_heads, layout.num_kv_heads), **options)


def gather_layers(model: nn.Module) -> None:
    """Let the layers of a decoder attend on one rank again."""
    for module in model.modules():
        if hasattr(module, CONTEXT):
            delattr(module, CONTEXT)
