"""Measures of a decoder's heads from its attention: slopes at gates, and mass by distance.

A gate g in 0 … 1 mixes the outputs of a head as global and as local: o(g) = g·o_global + (1 − g)·o_local.
The slope of the loss over it is ⟨∂L/∂o, o_global − o_local⟩, and one backward pass gives it for all heads.
The loss is far from linear in a gate, since other heads depend on the head's output: slopes half-way, with
all gates at the same place between 0 and 1, rank heads better than those at the ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from longshort.attention import attention
from longshort.conversion.heads import KVHead
from longshort.conversion.losses import attending, token_losses
from longshort.huggingface.interface import attend_by_layout
from longshort.huggingface.state import NAME
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int64
    from transformers import PreTrainedModel

    from longshort.conversion.heads import DecoderHeads


def measure_slopes(
    model: PreTrainedModel,
    heads: DecoderHeads,
    gates: Mapping[KVHead, float],
    windows: Int64[Tensor, "count length"],
    window: int,
    sink_tokens: int,
) -> dict[KVHead, float]:
    """Measure the slope of the mean loss over the gate of each head that may become local.

    Args:
        model: attends by layouts; in eval mode. No gradient reaches its parameters.
        heads: its heads.
        gates: 0 … 1 for each of these heads: 0 is local, 1 global.
        windows: token ids; the loss is the mean over them.
        window, sink_tokens: of local heads.

    Returns:
        Nats per token and gate: below 0 where the distance helps.
    """
    ends = [heads.layouts(kept, window, sink_tokens) for kept in (frozenset(heads.candidates), frozenset())]
    mixes = _mixes(heads, gates)
    slopes: dict[int, Tensor] = {}

    def attend(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
        outputs = []
        for layouts in ends:
            with attending(layouts):
                outputs.append(attend_by_layout(module, *args, **options)[0])
        if module.layer_idx not in mixes:
            return outputs[0], None
        distant, near = outputs
        mix = mixes[module.layer_idx].to(distant)
        out = mix * distant + (1 - mix) * near
        difference = (distant - near).detach()

        def note(gradient: Tensor) -> None:
            slope = (gradient * difference).float().sum((0, 1, 3)).cpu()
            slopes[module.layer_idx] = slopes.get(module.layer_idx, torch.zeros_like(slope)) + slope

        out.register_hook(note)
        return out, None

    with _replaced_attention(attend), _gradients_of_embeddings(model):
        for ids in windows:
            token_losses(model, ids).mean().backward()
    sizes = {layer.index: layer.num_heads // layer.num_kv_heads for layer in heads.layers}
    return {
        KVHead(layer, head): slopes[layer].view(-1, sizes[layer])[head].sum().item() / len(windows)
        for layer, head in heads.candidates
    }


def _mixes(heads: DecoderHeads, gates: Mapping[KVHead, float]) -> dict[int, Tensor]:
    """Return the gates of query heads by layer, (heads, 1), for layers that have candidates."""
    mixes = {}
    for layer in heads.layers:
        if layer.sliding_window is None:
            values = [gates[KVHead(layer.index, head)] for head in range(layer.num_kv_heads)]
            size = layer.num_heads // layer.num_kv_heads
            mixes[layer.index] = torch.tensor(values).repeat_interleave(size)[:, None]
    return mixes


def measure_mass(
    model: PreTrainedModel,
    heads: DecoderHeads,
    windows: Int64[Tensor, "count length"],
    distances: Sequence[int],
    sink_tokens: int,
) -> dict[KVHead, list[float]]:
    """Measure how much attention each head gives to tokens at a distance, with all heads global.

    Args:
        model: attends by layouts; in eval mode.
        heads: its heads.
        windows: token ids.
        distances: windows, ascending; the mass that is measured lies outside of each.
        sink_tokens: number of first tokens that do not count as distant.

    Returns:
        For each head that may become local, for each distance, the mean probability that its queries give to
        keys outside a window of that many tokens and the sink tokens. The mean is over query heads and rows,
        and the sinks of gpt-oss do not count.
    """
    sums: dict[int, Tensor] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        chosen = {"scale": options.get("scaling"), "softcap": options.get("softcap")}
        log_sums = [
            _log_sum(query, key, HeadLayout((near,) * query.shape[1], key.shape[1], sink), chosen)
            for near, sink in [(None, 0), *((distance, sink_tokens) for distance in distances)]
        ]
        outside = torch.stack([1 - (near - log_sums[0]).exp() for near in log_sums[1:]], dim=-1)
        mass = outside.clamp(min=0).mean((0, 2)).view(key.shape[1], -1, len(distances)).mean(1)
        sums[module.layer_idx] = (
            sums.get(module.layer_idx, torch.zeros(len(mass), len(distances))) + mass.cpu()
        )
        return attend_by_layout(module, query, key, value, *args, **options)

    layouts = heads.layouts(heads.candidates, max(distances), sink_tokens)
    with torch.no_grad(), _replaced_attention(attend), attending(layouts):
        for ids in windows:
            token_losses(model, ids)
    return {head: (sums[head.layer][head.head] / len(windows)).tolist() for head in heads.candidates}


def _log_sum(query: Tensor, key: Tensor, layout: HeadLayout, options: dict[str, Any]) -> Tensor:
    _, statistics = attention(query, key, key, layout, return_stats=True, **options)
    return statistics.lse


@contextmanager
def _replaced_attention(function: Callable[..., Any]) -> Iterator[None]:
    """Let models that attend by layouts call another function."""
    AttentionInterface.register(NAME, function)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attend_by_layout)


@contextmanager
def _gradients_of_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients flow back through a model to its embeddings, without reaching a parameter."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output.detach().requires_grad_()
    )
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter, requires in required:
            parameter.requires_grad_(requires)
