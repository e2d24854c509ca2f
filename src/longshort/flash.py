"""Attention in bf16 whose global heads go through PyTorch's own flash kernel, whatever that rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longshort.attention import AttentionStats, attention
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Float

_LARGEST_HEAD_DIM_ON_GPUS = 256


def flash_refusal(
    layout: HeadLayout, softcap: float | None, alibi_slopes: Sequence[float] | None, sink_logits: bool
) -> str | None:
    """Return why the precision "sdpa-bf16" cannot serve a layer with these settings, or None.

    PyTorch's flash kernel lacks some options. Local heads do not go through it and may have any.
    """
    slopes = [] if alibi_slopes is None else [alibi_slopes[head] for head in layout.global_heads]
    if not layout.global_heads:
        return None
    for is_on, option in (
        (softcap is not None, f"softcap={softcap!r}"),
        (any(slopes), "ALiBi"),
        (sink_logits, "sink_logits=True"),
    ):
        if is_on:
            return (
                f"attention_precision 'sdpa-bf16' does not go with {option} on global heads: PyTorch's flash "
                "kernel has no such option"
            )
    return None


class FlashAttention:
    """Causal attention of q, k and v in bf16, all tokens at once: global heads through the flash kernel of
    `scaled_dot_product_attention`, forward and backward, local heads through `attention`.

    The kernel multiplies hidden keys by 0, so that a NaN in a key reaches rows that do not see it.

    Args:
        layout: has a global head.
    """

    def __init__(self, layout: HeadLayout) -> None:
        assert layout.global_heads
        size = layout.group_size
        parts = [heads for heads in (layout.local_heads, layout.global_heads) if heads]
        self._parts = [
            (
                heads,
                tuple(head // size for head in heads[::size]),
                HeadLayout(
                    tuple(layout.windows[head] for head in heads), len(heads) // size, layout.sink_tokens
                ),
            )
            for heads in parts
        ]
        order = [head for heads in parts for head in heads]
        self._places = tuple(sorted(range(len(order)), key=order.__getitem__))

    def attend(
        self,
        q: Float[Tensor, "batch heads sequence head_dim"],
        k: Float[Tensor, "batch kv_heads sequence head_dim"],
        v: Float[Tensor, "batch kv_heads sequence head_dim"],
        **options: Any,
    ) -> Float[Tensor, "batch heads sequence head_dim"]:
        """Attend from all tokens to those before them.

        Args:
            q, k, v: bf16.
            **options: keyword arguments of `attention` for the local heads; the kernel has none of them.

        Raises:
            ValueError: head_dim is too large for the kernel on a GPU.
        """
        outputs = [
            _flash(*part) if layout.global_heads else attention(*part, layout, **given)
            for part, layout, given in self._split(q, k, v, options)
        ]
        return self._joined(outputs, 1)

    def attend_and_measure(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, AttentionStats]:
        """Attend, and return the statistics that `attention` gives too.

        Those of global heads are computed beside the kernel: they change no bit of the output.
        """
        outputs: list[Tensor] = []
        measured: list[AttentionStats] = []
        for part, layout, given in self._split(q, k, v, options):
            out, stats = attention(*part, layout, return_stats=True, **given)
            outputs.append(_flash(*part) if layout.global_heads else out)
            measured.append(stats)
        return self._joined(outputs, 1), AttentionStats(
            self._joined([stats.lse for stats in measured], 1),
            self._joined([stats.max_logit for stats in measured], 0),
            self._joined([stats.entropy for stats in measured], 0),
        )

    def _split(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> list[tuple[tuple[Tensor, Tensor, Tensor], HeadLayout, dict[str, Any]]]:
        """Return (q, k, v), layout and options of the local heads, then those of the global heads."""
        slopes = options.get("alibi_slopes")
        return [
            (
                (_heads_of(q, heads, 1), _heads_of(k, kv_heads, 1), _heads_of(v, kv_heads, 1)),
                layout,
                options if slopes is None else {**options, "alibi_slopes": _heads_of(slopes, heads, 0)},
            )
            for heads, kv_heads, layout in self._parts
        ]

    def _joined(self, parts: list[Tensor], dim: int) -> Tensor:
        """Join the heads of all parts in the order of the layout."""
        return parts[0] if len(parts) == 1 else _heads_of(torch.cat(parts, dim), self._places, dim)


def _heads_of(x: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    """Select heads of x along a dimension; a view if they are contiguous."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x.narrow(dim, heads[0], len(heads))
    return x.index_select(dim, torch.tensor(heads, device=x.device))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.numel() == 0:
        return q + 0 * (k.sum() + v.sum())  # the kernel of GPUs takes no empty sequences
    if q.is_cuda and q.shape[3] > _LARGEST_HEAD_DIM_ON_GPUS:
        raise ValueError(
            f"head_dim must be at most {_LARGEST_HEAD_DIM_ON_GPUS} for PyTorch's flash kernel on GPUs, "
            f"got {q.shape[3]}"
        )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it would take another kernel
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
