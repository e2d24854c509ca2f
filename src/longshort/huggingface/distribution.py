"""Context parallelism for decoders with layouts: their layers attend over sequences cut across ranks."""

from __future__ import annotations

from torch import nn

from longshort.distributed import ContextParallel, require_agreement
from longshort.huggingface.apply import attention_layers
from longshort.huggingface.interface import CONTEXT
from longshort.huggingface.state import layouts_of


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
        ValueError: it has no layouts, or the layouts differ between the ranks.
    """
    layouts = layouts_of(model)
    if layouts is None:
        raise ValueError(f"model must have layouts, got {type(model).__name__} without; call apply first")
    device = next(model.parameters()).device
    require_agreement({"the layouts of the layers": layouts}, context.group, device)
    for layer in attention_layers(model):  # pyright: ignore[reportArgumentType]
        path = layer.name.partition(" ")[0]  # the class follows
        setattr(model.get_submodule(path), CONTEXT, context)


def gather_layers(model: nn.Module) -> None:
    """Let the layers of a decoder attend on one rank again."""
    for module in model.modules():
        if hasattr(module, CONTEXT):
            delattr(module, CONTEXT)
