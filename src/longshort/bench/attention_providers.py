"""Providers of attention, prepared to be timed against each other.

- `cpu`, `triton`, `blockwise`, `reference`: the backends of `longshort.attention`; `cpu-statistics` and
  `triton-statistics`: with return_stats.
- `sdpa`: PyTorch's `scaled_dot_product_attention` with every head global: MHSA, the baseline. `sdpa-flash`,
  `sdpa-cudnn`, `sdpa-efficient`, `sdpa-math`: by that kernel of PyTorch's.
- `sdpa-masked`: the same with the layout as a boolean mask, which is built beforehand.
- `flex`: the backend of that name, PyTorch's FlexAttention with the layout as a block mask. Forward only on a
  CPU.
- `varlen`: PyTorch's `varlen_attn`, its flash kernel with a window, once for each group of heads that share
  one. For GPUs, bfloat16 and float16.
- `flash-sparse-attn`: the dense attention of the package of that name (2.0.6), Triton kernels for GPUs with a
  window by key/value head.
- `local-attention`: `LocalAttention` of the package of that name, for layouts without global heads. Its tiles
  are a window of queries against two windows of keys; by default a query sees between w + 1 and 2w keys.
  Here it gets window_size = w - 1 and exact_windowsize=True: a query sees the w keys of the layout, itself
  included, and the scores of the others in its tile are computed and masked.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longshort.attention import BACKENDS, attention, check_call
from longshort.bench.benchmark import UnsuitableError
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    def require_memory_of_scores(self) -> None:
        """Raise an UnsuitableError if plain PyTorch would take too much: logits, scores, weights,
        probabilities and a mask, and their gradients."""
        score_bytes = max(4, self.q.dtype.itemsize)
        arrays = 7 if self.q.requires_grad else 4
        self.require_memory(arrays * score_bytes + 1, batch=self.q.shape[0])

    def require_gpu(self, provider: str, dtypes: tuple[torch.dtype, ...] = ()) -> None:
        """Raise an UnsuitableError unless the inputs are on a GPU and of one of some dtypes, if any."""
        if not self.q.is_cuda:
            raise UnsuitableError(f"{provider} runs on GPUs alone: --device cuda")
        if dtypes and self.q.dtype not in dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UnsuitableError(f"{provider} computes {names} alone: --dtypes")


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


def visible_pairs(
    layout: HeadLayout, length: int, device: torch.device | None = None
) -> Bool[Tensor, "heads length length"]:
    """Mark the visible pairs of queries (rows) and keys, per head, without sink tokens."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
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
        if name == "reference":
            inputs.require_memory_of_scores()
        return Kernel(run, layout)

    return prepare_backend


def _sdpa(inputs: AttentionInputs) -> Kernel:
    grouped = inputs.layout.group_size > 1
    causal = inputs.q.shape[2] > 1  # one query, the last, sees every key

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return Kernel(run, all_global(inputs.layout))


def _sdpa_by(name: str, kernel: SDPBackend) -> Callable[[AttentionInputs], Kernel]:
    def prepare_sdpa(inputs: AttentionInputs) -> Kernel:
        if kernel is SDPBackend.MATH:
            inputs.require_memory_of_scores()
        else:
            inputs.require_gpu(name)
        whole = _sdpa(inputs)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return whole.run(q, k, v)

        return replace(whole, run=run)

    return prepare_sdpa


def _masked_sdpa(inputs: AttentionInputs) -> Kernel:
    layout = inputs.layout
    inputs.require_memory(1 + inputs.q.dtype.itemsize)  # the mask, and SDPA's own copy as numbers
    mask = visible_pairs(layout, inputs.length, inputs.q.device)[None]
    grouped = layout.group_size > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return Kernel(run, layout, note="its boolean mask was made beforehand")


def _flex(inputs: AttentionInputs) -> Kernel:
    kernel = _backend("flex")(inputs)
    began = time.perf_counter()
    try:
        with torch.set_grad_enabled(inputs.q.requires_grad):  # it is compiled for one or the other
            kernel.run(inputs.q, inputs.k, inputs.v)
    except RuntimeError as error:
        reason = f"FlexAttention does not compile here: {type(error).__name__}: {error}"
        raise UnsuitableError(reason.partition("\n")[0]) from error
    seconds = time.perf_counter() - began
    note = f"its block mask and its compilation, {seconds:.0f} s together, are not counted"
    return replace(kernel, note=note)


def _varlen(inputs: AttentionInputs) -> Kernel:
    inputs.require_gpu("varlen", (torch.bfloat16, torch.float16))
    try:
        varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        raise UnsuitableError(f"torch {torch.__version__} has no varlen_attn") from error
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        raise UnsuitableError(f"varlen_attn of torch {torch.__version__} has no windows")
    layout, device = inputs.layout, inputs.q.device
    if [head for group in layout.groups for head in group.heads] != list(range(layout.num_heads)):
        raise UnsuitableError("varlen takes heads of one window side by side")
    batch, _, q_len, head_dim = inputs.q.shape
    ends = [torch.arange(batch + 1, dtype=torch.int32, device=device) * n for n in (q_len, inputs.length)]
    # older ones take any number of key/value heads
    grouped = {"enable_gqa": True} if layout.group_size > 1 and "enable_gqa" in known else {}

    def packed(x: Tensor, heads: tuple[int, ...]) -> Tensor:
        return x[:, heads[0] : heads[-1] + 1].transpose(1, 2).flatten(0, 1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            varlen_attn(
                packed(q, group.heads),
                *(packed(x, group.kv_heads) for x in (k, v)),
                *ends,
                q_len,
                inputs.length,
                window_size=(-1 if group.window is None else group.window - 1, 0),
                **grouped,
            )
            for group in layout.groups
        ]
        out = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return out.view(batch, q_len, -1, head_dim).transpose(1, 2)

    return Kernel(run, layout, note="one call for each group of heads, whose outputs are joined")


def _flash_sparse_attention(inputs: AttentionInputs) -> Kernel:
    try:
        package = import_module("flash_sparse_attn")
    except ImportError as error:
        raise UnsuitableError(f"not installed: pip install flash-sparse-attn ({error})") from error
    inputs.require_gpu("flash-sparse-attn", (torch.bfloat16, torch.float16))
    layout, length = inputs.layout, inputs.length
    # its columns: sink tokens, a distant band, the gap before it, the nearest keys with the query's own
    windows = [[0, 0, 0, min(w or length, length)] for w in layout.windows[:: layout.group_size]]
    window_sizes = torch.tensor(windows, dtype=torch.int32, device=inputs.q.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = package.flash_dense_attn_func(q, k, v, is_causal=True, window_sizes=window_sizes)
        return out.transpose(1, 2)

    return Kernel(run, layout, note="it searches its tiles in the round for warm-up")


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
    "triton-statistics": _backend("triton", with_statistics=True),
    "sdpa": _sdpa,
    "sdpa-flash": _sdpa_by("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa_by("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": _sdpa_by("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": _sdpa_by("sdpa-math", SDPBackend.MATH),
    "sdpa-masked": _masked_sdpa,
    "flex": _flex,
    "varlen": _varlen,
    "flash-sparse-attn": _flash_sparse_attention,
    "local-attention": _local_attention,
}
"""The function that prepares each provider, by name."""

BASELINE = "sdpa"
"""The provider that the others are compared with."""

ON_GPU = (
    "triton", "triton-statistics", "blockwise", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient",
    "sdpa-math", "flex", "varlen", "flash-sparse-attn",
)  # fmt: skip
"""The providers that run on GPUs at any layout, those of n×n arrays where they fit."""
