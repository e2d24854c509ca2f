"""Providers of attention on a CPU, prepared to be timed against each other.

- `cpu`, `blockwise`, `reference`: the backends of `longshort.attention`; `cpu-statistics`: with return_stats.
- `sdpa`: PyTorch's `scaled_dot_product_attention` with every head global: MHSA, the baseline.
- `sdpa-masked`: the same with the layout as a boolean mask, which is built beforehand.
- `flex`: PyTorch's `flex_attention`, compiled, with the layout as a block mask. Forward only.
- `local-attention`: `LocalAttention` of the package of that name, for layouts without global heads. Its tiles
  are a window of queries against two windows of keys; by default a query sees between w + 1 and 2w keys.
  Here it gets window_size = w - 1 and exact_windowsize=True: a query sees the w keys of the layout, itself
  included, and the scores of the others in its tile are computed and masked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longshort.attention import BACKENDS, attention, check_call
from longshort.bench.benchmark import UnsuitableError
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_FLEX_BLOCK = 128  # queries and keys of a block, FlexAttention's default


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of causal attention over heads of `layout`.

    Attributes:
        layout: windows of the query heads; no sink tokens.
        q, k, v: float64, float32, bfloat16 or float16; they require gradients if there is a backward pass. As
            many queries as keys, or one query, the last.
        max_bytes: most bytes that a provider's arrays of length × length may take, over all heads.
    """

    layout: HeadLayout
    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch kv_heads length head_dim"]
    v: Float[Tensor, "batch kv_heads length head_dim"]
    max_bytes: float

    @property
    def length(self) -> int:
        """The keys of a sequence."""
        return self.k.shape[2]

    def require_memory(self, bytes_per_pair: int, batch: int = 1) -> None:
        """Raise an UnsuitableError if arrays of that many bytes per head, query and key are too large."""
        size = f"{self.q.shape[2]} × {self.length}"
        gib = bytes_per_pair * batch * self.layout.num_heads * self.q.shape[2] * self.length / 2**30
        limit = self.max_bytes / 2**30
        if gib > limit:
            text = f"arrays of {size} take about {gib:.3g} GiB, --max-memory-gib allows {limit:.3g}"
            raise UnsuitableError(text)


@dataclass(frozen=True)
class Kernel:
    """A provider that is prepared for its inputs.

    Attributes:
        run: q, k, v -> out, shaped like q.
        layout: the heads that it computes, whose visible pairs are its work.
        note: a remark on its time or what it computes; None if there is none.
    """

    run: Attend
    layout: HeadLayout
    note: str | None = None


def prepare(provider: str, inputs: AttentionInputs) -> Kernel:
    """Prepare a provider of `PROVIDERS`: masks are built and code is compiled here, not when it runs.

    Raises:
        UnsuitableError: it cannot serve these inputs, or cannot compute the gradients that they require.
    """
    return PROVIDERS[provider](inputs)


def all_global(layout: HeadLayout) -> HeadLayout:
    """Return the same heads, each of them global: MHSA."""
    return HeadLayout((None,) * layout.num_heads, layout.num_kv_heads)


def visible_pairs(layout: HeadLayout, length: int) -> Bool[Tensor, "heads length length"]:
    """Mark the visible pairs of queries (rows) and keys, per head, without sink tokens."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = {
        group.window: causal if group.window is None else causal.triu(1 - group.window)
        for group in layout.groups
    }
    return torch.stack([masks[window] for window in layout.windows])


def _backend(name: str, with_statistics: bool = False) -> Callable[[AttentionInputs], Kernel]:
    def prepare_backend(inputs: AttentionInputs) -> Kernel:
        layout = inputs.layout

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if with_statistics:
                return attention(q, k, v, layout, backend=name, return_stats=True)[0]
            return attention(q, k, v, layout, backend=name)

        try:
            check_call(inputs.q, inputs.k, inputs.v, layout, backend=name)
        except ValueError as error:
            raise UnsuitableError(str(error)) from error
        if name == "reference":  # logits, scores, weights, probabilities and a mask; their gradients
            score_bytes = max(4, inputs.q.dtype.itemsize)
            arrays = 7 if inputs.q.requires_grad else 4
            inputs.require_memory(arrays * score_bytes + 1, batch=inputs.q.shape[0])
        return Kernel(run, layout)

    return prepare_backend


def _sdpa(inputs: AttentionInputs) -> Kernel:
    grouped = inputs.layout.group_size > 1
    causal = inputs.q.shape[2] > 1  # one query, the last, sees every key

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return Kernel(run, all_global(inputs.layout))


def _masked_sdpa(inputs: AttentionInputs) -> Kernel:
    layout = inputs.layout
    inputs.require_memory(1 + inputs.q.dtype.itemsize)  # the mask, and SDPA's own copy as numbers
    mask = visible_pairs(layout, inputs.length)[None]
    grouped = layout.group_size > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return Kernel(run, layout, note="its boolean mask was made beforehand")


def _flex(inputs: AttentionInputs) -> Kernel:
    if inputs.q.requires_grad:
        raise UnsuitableError("FlexAttention has no backward pass on a CPU")
    layout = inputs.layout
    began = time.perf_counter()
    block_mask = flex_block_mask(layout, inputs.length)
    torch.compiler.reset()  # else a sweep meets the limit on recompilations and continues without compiling
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = layout.group_size > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)
        assert isinstance(out, torch.Tensor)
        return out

    try:
        run(inputs.q, inputs.k, inputs.v)
    except RuntimeError as error:
        reason = f"FlexAttention does not compile here: {type(error).__name__}: {error}"
        raise UnsuitableError(reason.partition("\n")[0]) from error
    seconds = time.perf_counter() - began
    note = f"its block mask and its compilation, {seconds:.0f} s together, are not counted"
    return Kernel(run, layout, note)


def flex_block_mask(layout: HeadLayout, length: int) -> BlockMask:
    """Build FlexAttention's block mask of a layout by arithmetic on blocks: no length × length array."""
    reach = torch.tensor([length if window is None else window for window in layout.windows])
    index = torch.arange(-(-length // _FLEX_BLOCK))
    nearest = (index[:, None] - index) * _FLEX_BLOCK - (_FLEX_BLOCK - 1)  # smallest distance of query to key
    farthest = nearest + 2 * (_FLEX_BLOCK - 1)
    limit = reach[:, None, None]
    seen = (farthest >= 0) & (nearest < limit)
    whole = (nearest >= 0) & (farthest < limit)

    def sees(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < reach[head])

    return BlockMask.from_kv_blocks(
        *_block_lists(seen & ~whole),
        *_block_lists(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _block_lists(
    blocks: Bool[Tensor, "heads rows columns"],
) -> tuple[Int[Tensor, "1 heads rows"], Int[Tensor, "1 heads rows columns"]]:
    """Count the blocks that are set in each row, and lists their columns before those of the others."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return counts[None], columns.int()[None].contiguous()


def _local_attention(inputs: AttentionInputs) -> Kernel:
    layout = inputs.layout
    windows = set(layout.windows)
    window = layout.windows[0]
    if window is None or len(windows) > 1:
        raise UnsuitableError("local-attention has no global heads: choose --global-heads 0")
    if window == 1:
        raise UnsuitableError("local-attention cannot see one key alone, a window of 1")
    if layout.group_size > 1:
        raise UnsuitableError("local-attention has as many key/value heads as heads")
    try:
        package = import_module("local_attention")
    except ImportError as error:
        raise UnsuitableError(f"not installed: pip install local-attention ({error})") from error
    run = package.LocalAttention(
        window_size=window - 1,  # its exact windows reach that far back, the query itself not counted
        exact_windowsize=True,
        causal=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    note = f"with its exact windows: a query sees {window} keys as here, not {window + 1} to {2 * window}"
    return Kernel(run, layout, note=note)


PROVIDERS: dict[str, Callable[[AttentionInputs], Kernel]] = {
    **{name: _backend(name) for name in BACKENDS},
    "cpu-statistics": _backend("cpu", with_statistics=True),
    "sdpa": _sdpa,
    "sdpa-masked": _masked_sdpa,
    "flex": _flex,
    "local-attention": _local_attention,
}
"""The function that prepares each provider, by name."""

BASELINE = "sdpa"
"""The provider that the others are compared with."""
