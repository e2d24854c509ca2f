"""`LongShortAttention`: LS-attention as an `nn.Module`, with per-head QK-norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longshort.attention import BACKENDS, AttentionStats, attention, autocast_is_on, require_tensor
from longshort.checks import is_finite, require_integer, require_positive
from longshort.convolution import ShortConvolution
from longshort.flash import FlashAttention, flash_refusal
from longshort.key_values import KeyValueCache, UpdatableCache, UpdatedCache, positions_after
from longshort.layout import HeadLayout
from longshort.projection import project
from longshort.rotary import Rotary, rotate, rotated_runs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-flash": torch.bfloat16,
    "sdpa-bf16": torch.bfloat16,
}

ATTENTION_PRECISIONS = ("input", *_DTYPES)
"""Precisions of attention. input: that of the layer or of autocast. The others say what q, k and v are cast
to, and what else is rounded.

- fp64: slow, the truth that the others are compared with; and fp32.
- bf16: scores, probabilities and sums stay in fp32.
- bf16-flash: the probabilities are rounded too, as flash kernels do.
- sdpa-bf16: as bf16, but global heads go through PyTorch's own flash kernel, whatever that rounds. It has no
  softcap, ALiBi, sink logits or segments. Through a cache the layer attends as with bf16.
"""


@dataclass(frozen=True)
class Observation:
    """The tensors and statistics of one attention call, given to `LongShortAttention.observer`.

    The tensors are live: they are in the graph of the forward pass and must not be changed in place.

    Attributes:
        q, k, v: as attention got them: normalised, rotated, in the attention's precision.
        stats: the call's statistics.
        options: the other keyword arguments of the call (`segment_ids`, `softcap`, ...), from which
            `attention` gives the same statistics and, but for "sdpa-bf16", the same output.
    """

    q: Float[Tensor, "batch heads q_len head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    v: Float[Tensor, "batch kv_heads kv_len head_dim"]
    stats: AttentionStats
    options: dict[str, Any]
    extend: Callable[[Observation, int], Observation] | None = None
    """Makes an observation with earlier keys, if the sequence is cut across ranks; None if it is not."""

    def with_earlier_keys(self, count: int) -> Observation:
        """Return an observation with the keys that lie up to `count` before these, if other ranks hold them:
        then all ranks must call it."""
        return self if self.extend is None else self.extend(self, count)


Observer = Callable[[Observation], None]


class LongShortAttention(nn.Module):
    """Causal LS-attention with its projections: one fused matrix for queries, keys and values, all heads of
    the layout in its order, and one output projection. No biases.

    Args:
        embed_dim: width of the hidden states.
        layout: window of each head; all heads global is ordinary multi-head attention.
        head_dim: width of a head, independent of embed_dim; None is embed_dim / heads.
        qk_norm: LayerNorm over head_dim on queries and keys, one gain for each, before the rotation (ViT-22B,
            Dehghani et al. 2023): a logit is at most sqrt(head_dim)·max|q_gain|·max|k_gain| in size.
        rotary: rotary positions, or None.
        attention_precision: one of `ATTENTION_PRECISIONS`. With "input", `torch.autocast` applies to the
            attention too; with the others it does not.
        softcap: > 0, bounds the scores: softcap·tanh(score/softcap) (Bello et al. 2016; Gemma 2).
        alibi_slopes: one finite number per query head; a buffer in fp32 that stays so in a bf16 module.
        sink_logits: a learned logit per query head, (heads,), joins the softmax's denominator and takes up
            attention that no key should get, as in gpt-oss; 0 at the start.
        short_convolution: kernel size >= 2 of a `ShortConvolution` on queries, keys and values, before norm
            and rotation; it keeps no state for decoding, so no cache goes with it. None: off.
        backend: "auto" or a name of `longshort.attention.BACKENDS`.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Attributes:
        observer: called with an `Observation` in every forward pass (in a checkpointed one also when it is
            recomputed) while it is not None; it changes no bit of outputs and gradients. `add_observer`
            adds more than one.
        function: computes the attention of passes without a cache, and of observed ones, unless the precision
            is "sdpa-bf16"; takes and returns what `longshort.attention.attention` does, which it is at first.
            Across ranks it is a `longshort.distributed.ContextParallel`.

    Raises:
        TypeError: layout is no HeadLayout, or rotary no Rotary.
        ValueError: an argument is out of its range; the message names it.
    """

    alibi_slopes: Float[Tensor, " heads"] | None

    def __init__(
        self,
        embed_dim: int,
        layout: HeadLayout,
        head_dim: int | None = None,
        qk_norm: bool = False,
        rotary: Rotary | None = None,
        *,
        attention_precision: str = "input",
        softcap: float | None = None,
        alibi_slopes: Iterable[float] | None = None,
        sink_logits: bool = False,
        short_convolution: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integer("embed_dim", embed_dim, minimum=1)
        if not isinstance(layout, HeadLayout):
            raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
        heads, kv_heads = layout.num_heads, layout.num_kv_heads
        if head_dim is None:
            if embed_dim % heads:
                raise ValueError(
                    f"head_dim is needed: embed_dim {embed_dim} is not divisible by {heads} heads"
                )
            head_dim = embed_dim // heads
        require_integer("head_dim", head_dim, minimum=1)
        for name, value in (("qk_norm", qk_norm), ("sink_logits", sink_logits)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if attention_precision not in ATTENTION_PRECISIONS:
            raise ValueError(
                f"attention_precision must be one of {ATTENTION_PRECISIONS}, got {attention_precision!r}"
            )
        if softcap is not None:
            require_positive("softcap", softcap)
        if short_convolution is not None:
            require_integer("short_convolution", short_convolution, minimum=2)
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")

        self.embed_dim = embed_dim
        self.layout = layout
        self.head_dim = head_dim
        self.rotary = rotary
        self.attention_precision = attention_precision
        self.softcap = softcap
        self.backend = backend
        self.function: Callable[..., Any] = attention
        self.observer: Observer | None = None
        self._observers: tuple[Observer, ...] = ()  # compilers look at it: equal ones are no new graph
        self._rotated_runs = rotated_runs(rotary, layout, head_dim)
        self._slopes = _checked_slopes(alibi_slopes, heads)
        self._flash = FlashAttention(layout) if layout.global_heads else None
        refused = flash_refusal(layout, softcap, self._slopes, sink_logits)
        if attention_precision == "sdpa-bf16" and refused is not None:
            raise ValueError(refused)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = (heads + 2 * kv_heads) * head_dim
        self.qkv_proj = nn.Linear(embed_dim, channels, **factory, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, embed_dim, **factory, bias=False)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-5, bias=False, **factory) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-5, bias=False, **factory) if qk_norm else None
        self.sink_logits = nn.Parameter(torch.zeros(heads, **factory)) if sink_logits else None
        self.short_convolution = (
            None if short_convolution is None else ShortConvolution(channels, short_convolution, **factory)
        )
        self.register_buffer("alibi_slopes", self._slopes_on(device), persistent=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch q_len embed_dim"],
        segment_ids: Int[Tensor, "batch kv_len"] | None = None,
        position_ids: Int[Tensor, "batch q_len"] | None = None,
        cache: KeyValueCache | UpdatableCache | None = None,
    ) -> Float[Tensor, "batch q_len embed_dim"]:
        """Attend from the given tokens to themselves and to those in the cache.

        Args:
            hidden_states: the input, in the dtype of the parameters, or in any under autocast.
            segment_ids: integers for all keys, the cached ones first; queries and keys of unequal ids do not
                see each other, negative is padding.
            position_ids: integers, (batch, q_len) or (1, q_len), for rotary positions only; None counts on
                from the cache's length.
            cache: gets the new keys and values, after norm and rotation; None with a short convolution.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a shape or dtype is not allowed, the cache has another layout, a cache comes to a
                short convolution, or rotary positions are unknown: the cache has no `length` and
                position_ids are not given; or segment_ids come without a cache to attention_precision
                "sdpa-bf16" and a global head.
        """
        keys_and_values = None if cache is None else self._adapted(cache)
        past = self._check_input(hidden_states, segment_ids, position_ids, keys_and_values)
        batch, q_len, _ = hidden_states.shape
        heads, kv_heads = self.layout.num_heads, self.layout.num_kv_heads
        qkv = project(self.qkv_proj, hidden_states)
        if self.short_convolution is not None:
            qkv = self.short_convolution(qkv, segment_ids)
        by_head = qkv.view(batch, q_len, heads + 2 * kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = by_head.split([heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            if position_ids is None:
                position_ids = positions_after(past, q_len, q.device)
            q, k = rotate(q, k, position_ids, self.rotary.base, self._rotated_runs)
        dtype = _DTYPES.get(self.attention_precision, qkv.dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out = self._attend(q, k, v, segment_ids, keys_and_values).to(qkv.dtype)
        return project(self.o_proj, out.transpose(1, 2).reshape(batch, q_len, heads * self.head_dim))

    def add_observer(self, observer: Observer) -> None:
        """Let one more observer see every forward pass, beside `observer` and those added before."""
        self._observers = (*self._observers, observer)

    def remove_observer(self, observer: Observer) -> None:
        """Take out an observer that was added, in any order with others.

        Raises:
            ValueError: it was not added, or is out already.
        """
        if observer not in self._observers:
            raise ValueError(f"observer must have been added to this layer, got {observer!r}")
        last = len(self._observers) - 1 - self._observers[::-1].index(observer)
        self._observers = self._observers[:last] + self._observers[last + 1 :]

    @property
    def is_observed(self) -> bool:
        """Whether anyone watches the forward passes."""
        return self.observer is not None or bool(self._observers)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        options: dict[str, Any] = {
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sink_logits": self.sink_logits,
            "segment_ids": segment_ids,
            "round_probabilities": self.attention_precision == "bf16-flash",
        }
        as_it_comes = self.attention_precision == "input"
        with nullcontext() if as_it_comes else torch.autocast(q.device.type, enabled=False):
            flash = self._flash_for(cache)
            if not self.is_observed:
                if cache is not None:
                    return cache.attend(q, k, v, backend=self.backend, **options)
                if flash is not None:
                    return flash.attend(q, k, v, backend=self.backend, **options)
                return self.function(q, k, v, self.layout, backend=self.backend, **options)
            if cache is not None:
                k, v = cache.update(k, v, segment_ids)
            if flash is not None:
                out, stats = flash.attend_and_measure(q, k, v, backend=self.backend, **options)
            else:
                out, stats = self.function(
                    q, k, v, self.layout, backend=self.backend, return_stats=True, **options
                )
        extend = getattr(self.function, "with_earlier_keys", None)
        observation = Observation(q, k, v, stats, options, extend)
        for observer in (self.observer, *self._observers):
            if observer is not None:
                observer(observation)
        return out

    def _flash_for(self, cache: KeyValueCache | None) -> FlashAttention | None:
        """Return what computes the attention if PyTorch's flash kernel takes part in it."""
        return self._flash if self.attention_precision == "sdpa-bf16" and cache is None else None

    def _check_input(
        self, hidden_states: Any, segment_ids: Any, position_ids: Any, cache: KeyValueCache | None
    ) -> int | Tensor:
        """Refuse bad input before anything is computed or cached; return the number of cached tokens, 0 where
        that is unknown; see `KeyValueCache.begins_at`."""
        require_tensor("hidden_states", hidden_states)
        if hidden_states.ndim != 3 or hidden_states.shape[2] != self.embed_dim:
            raise ValueError(
                f"hidden_states must be (batch, sequence, embed_dim = {self.embed_dim}), "
                f"got shape {tuple(hidden_states.shape)}"
            )
        weight = getattr(self.qkv_proj, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():  # not if quantized
            self._check_kind(hidden_states, weight)
        batch, q_len, _ = hidden_states.shape
        length = 0 if cache is None else cache.begins_at(q_len)
        if segment_ids is not None:
            _require_integers("segment_ids", segment_ids, hidden_states.device)
            known = length if isinstance(length, int) else max(0, segment_ids.shape[-1] - q_len)
            kv_len = known + q_len
            if tuple(segment_ids.shape) != (batch, kv_len):
                raise ValueError(
                    f"segment_ids must be (batch, kv_len), one for each of the {known} cached and the "
                    f"{q_len} new tokens of the {batch} sequences, got shape {tuple(segment_ids.shape)}"
                )
            if self._flash_for(cache) is not None:
                raise ValueError(
                    "segment_ids (packed or padded sequences) must be None with attention_precision "
                    "'sdpa-bf16', since PyTorch's flash kernel has no segments"
                )
        if position_ids is not None:
            require_position_ids(position_ids, batch, q_len, hidden_states.device)
        elif self.rotary is not None and length is None:
            raise ValueError("position_ids are needed: rotary positions with a cache that has no `length`")
        return 0 if length is None else length

    def _adapted(self, cache: KeyValueCache | UpdatableCache) -> KeyValueCache:
        """A cache as this layer uses it; raises unless it can serve the layer."""
        kind = type(cache).__name__
        if getattr(self.function, "is_across_ranks", False):
            raise ValueError(
                f"cache must be None (use_cache=False) while sequences are cut across ranks, got {kind}"
            )
        if self.short_convolution is not None:
            raise ValueError(f"cache must be None: short_convolution keeps no state for decoding, got {kind}")
        adapted = cache if isinstance(cache, KeyValueCache) else UpdatedCache(cache, self.layout)
        if not self.layout.equals(adapted.layout):
            raise ValueError(
                f"cache must have the layout of the layer, {self.layout!r}, got {adapted.layout!r}"
            )
        if self.is_observed and not adapted.has_every_key:
            raise ValueError(
                f"cache must keep every key while there is an observer, which is to see them, got {kind}"
            )
        return adapted

    @staticmethod
    def _check_kind(hidden_states: Tensor, weight: Tensor) -> None:
        if hidden_states.device != weight.device:
            raise ValueError(
                f"hidden_states must be on the device of the layer ({weight.device}), "
                f"got {hidden_states.device}"
            )
        is_cast = autocast_is_on(weight.device) and hidden_states.is_floating_point()
        if hidden_states.dtype != weight.dtype and not is_cast:
            raise ValueError(
                f"hidden_states must have the dtype of the layer ({weight.dtype}), got {hidden_states.dtype}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make such a layer, but backend, device and dtype."""
        convolution = self.short_convolution
        return {
            "embed_dim": self.embed_dim,
            "layout": self.layout,
            "head_dim": self.head_dim,
            "qk_norm": self.q_norm is not None,
            "rotary": self.rotary,
            "attention_precision": self.attention_precision,
            "softcap": self.softcap,
            "alibi_slopes": self._slopes,
            "sink_logits": self.sink_logits is not None,
            "short_convolution": None if convolution is None else convolution.weight.shape[1],
        }

    def reset_buffers(self) -> None:
        """Write the ALiBi slopes again, after a loader has left the non-persistent buffers undefined."""
        if self.alibi_slopes is not None:
            self.alibi_slopes = self._slopes_on(self.alibi_slopes.device)

    def _slopes_on(self, device: torch.device | str | None) -> Tensor | None:
        if self._slopes is None:
            return None
        return torch.tensor(self._slopes, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LongShortAttention:
        super()._apply(fn, recurse)
        self.reset_buffers()  # a module moved to bf16 keeps its slopes exact
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.layout!r}", f"head_dim={self.head_dim}"]
        if self.rotary is not None:
            parts.append(f"rotary={self.rotary}")
        if self.attention_precision != "input":
            parts.append(f"attention_precision={self.attention_precision!r}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap}")
        if self.sink_logits is not None:
            parts.append("sink_logits=True")
        return ", ".join(parts)


def _checked_slopes(slopes: Any, heads: int) -> tuple[float, ...] | None:
    if slopes is None:
        return None
    if isinstance(slopes, str) or not isinstance(slopes, Iterable):
        raise ValueError(f"alibi_slopes must be a sequence of one number per query head, got {slopes!r}")
    checked = tuple(slopes)
    if len(checked) != heads or not all(is_finite(slope) for slope in checked):
        raise ValueError(f"alibi_slopes must be {heads} finite numbers, one per query head, got {checked}")
    return tuple(float(slope) for slope in checked)


def require_position_ids(position_ids: Any, batch: int, q_len: int, device: torch.device) -> None:
    """Raise a TypeError or ValueError that names position_ids unless they are integers of shape
    (batch, q_len) or (1, q_len) on the device."""
    _require_integers("position_ids", position_ids, device)
    if tuple(position_ids.shape) not in ((batch, q_len), (1, q_len)):
        raise ValueError(
            f"position_ids must be (batch, sequence) = {(batch, q_len)} or {(1, q_len)}, "
            f"got shape {tuple(position_ids.shape)}"
        )


def _require_integers(name: str, value: Any, device: torch.device) -> None:
    require_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of the hidden states ({device}), got {value.device}")
