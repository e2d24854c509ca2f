"""`LayerCache`: the keys and values of one attention layer, and attention to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longshort.attention import attention, cast_as_autocast, check_call, require_tensor, with_sink_logits
from longshort.backends import operators, triton
from longshort.cache.groups import Group, attend_to_store
from longshort.cache.kernels import CacheKernel, CPUKernel, TritonKernel
from longshort.cache.sinks import SinkTokens
from longshort.cache.store import Store
from longshort.checks import require_integer
from longshort.key_values import KeyValueCache, is_recording
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int

_RECORDED = 1024
"""The largest number of tokens that may be cropped again while recording; drafts are not longer."""


class LayerCache(KeyValueCache):
    """Keys and values of one layer: a ring of w keys for each window w, and all keys for global heads.

    Nothing is allocated before the first tokens come; they give batch, head_dim, dtype and device. Stores
    keep no gradients.

    With max_length, on a GPU, steps of one token after the first call may be compiled with any mode, or
    captured in a CUDA graph: they then count tokens on the device, and `length` waits for it. A token for
    which there is no memory then gives NaN.

    Args:
        layout: the layout of the layer's heads.
        rollback: tokens that `crop` may take back once rings are full; each ring holds that many more keys.
        max_length: number of tokens that memory is allocated for, at the first append; more are refused. None
            grows, with at most a quarter of slack.

    Attributes:
        counts_on_device: whether steps may be compiled or captured as above. Callers that need `length` in
            them set it to False.

    Raises:
        TypeError: layout is no HeadLayout.
        ValueError: rollback or max_length is out of its range.
    """

    def __init__(self, layout: HeadLayout, rollback: int = 0, max_length: int | None = None) -> None:
        if not isinstance(layout, HeadLayout):
            raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
        require_integer("rollback", rollback, minimum=0)
        if max_length is not None:
            require_integer("max_length", max_length, minimum=1)
        self.layout = layout
        self.max_length = max_length
        self.rollback = rollback
        self.record_past = False
        self._since_crop = 0
        self.stores = [
            Store(group.window, layout.sink_tokens, rollback, max_length) for group in layout.groups
        ]
        has_sinks = any(store.sink_tokens for store in self.stores)
        self._sink_tokens = SinkTokens(layout.sink_tokens) if has_sinks else None
        self._accepted: list[Any] | None = None
        self._groups = [Group(group, layout) for group in layout.groups]
        self.counts_on_device = True
        self._gpu_kernel = TritonKernel(layout, max_length)
        self._kernels = CPUKernel(layout), self._gpu_kernel
        self._may_record = False  # steps of one token
        self._is_counted_on_device = False  # by such steps, of which the host sees one at most

    def __getstate__(self) -> dict[str, Any]:
        """Return the state as the host has it: a copy gets its own memory on the device."""
        self._count()
        return {**self.__dict__, "_may_record": False, "_is_counted_on_device": False}

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens seen so far, padding included."""
        self._count()
        return self.stores[0].length

    def begins_at(self, new: int) -> int | Tensor:
        """Return the number of tokens before the next `new` ones; see `KeyValueCache.begins_at`."""
        if new == 1 and self._may_record and not self.record_past and is_recording():
            assert self._gpu_kernel.length is not None
            return self._gpu_kernel.length
        return self.length

    def count_on_host(self) -> None:
        """Take the number of tokens from the host until the next call that is not compiled."""
        self._may_record = False

    @property
    def has_every_key(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether nothing is in the cache yet, so that the new keys are all there are."""
        return self.length == 0

    @property
    def batch_size(self) -> int | None:
        """Sequences; None before the first append."""
        data = self.stores[0].data
        return None if data is None else data.shape[1]

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are kept: `layout.kv_bytes` for each sequence, with rollback
        0."""
        return sum(store.nbytes_used() for store in self.stores) if self.length else 0

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of memory taken for keys and values."""
        return sum(store.nbytes_allocated() for store in self.stores)

    def attend(
        self,
        q: Float[Tensor, "batch heads new head_dim"],
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new head_dim"],
        *,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Float[Tensor, " heads"] | None = None,
        sink_logits: Float[Tensor, " heads"] | None = None,
        segment_ids: Int[Tensor, "batch kv_len"] | None = None,
        round_probabilities: bool = False,
        backend: str = "auto",
    ) -> Float[Tensor, "batch heads new head_dim"]:
        """Append the keys and values of new tokens; attend from these to all tokens, as causal
        `longshort.attention` over the whole sequence would. The arguments without a line below are those of
        `longshort.attention`.

        Args:
            q: new >= 1; batch, head_dim, dtype and device as in the first call.
            k: as q.
            v: as q.
            segment_ids: for all tokens, the earlier ones first; for max_length tokens, of which later ones do
                not count, where the step is compiled or captured on a GPU. With `layout.sink_tokens` a
                sequence is one segment, with padding wherever.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: an argument is not allowed; the cache is full; or gradients are asked for through
                tokens in the cache, which keeps none.
        """
        q, k, v = cast_as_autocast(q, k, v)
        options: dict[str, Any] = {
            "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "sink_logits": sink_logits,
            "segment_ids": segment_ids, "round_probabilities": round_probabilities, "backend": backend,
        }  # fmt: skip
        past = self._check(q, k, v, options)
        if isinstance(past, Tensor):
            return self._attend_in_recording(q, k, v, options, past)
        if self.record_past:
            self._record(k.shape[2])
        if past == 0:
            out = attention(q, k, v, self.layout, **options)
            self._append(k, v, segment_ids)
        else:
            self._note(segment_ids, k, past)
            kernel = self._kernel(q, backend, round_probabilities)
            if kernel is not None:
                out = self._attend_by_kernel(kernel, q, k, v, options)
            else:
                out = self._attend_by_group(q, k, v, options)
        self._prepare(k, backend, round_probabilities)
        return out

    def append(
        self,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new head_dim"],
        segment_ids: Int[Tensor, "batch kv_len"] | None = None,
    ) -> None:
        """Append keys and values without attending to anything; arguments and errors as of `attend`."""
        k, v = cast_as_autocast(k, v)
        self._check(None, k, v, {"segment_ids": segment_ids})
        if self.record_past:
            self._record(k.shape[2])
        self._append(k, v, segment_ids)
        self._prepare(k)

    def update(self, k: Tensor, v: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append to an empty cache, and return the keys and values; arguments and errors as of `attend`.

        Raises:
            ValueError: there are tokens in the cache, which does not keep all of their keys.
        """
        if not self.has_every_key:
            raise ValueError(
                f"the cache must be empty for an update, since it drops keys; it holds {self.length} tokens"
            )
        self.append(k, v, segment_ids)
        return k, v

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on.

        Raises:
            ValueError: length is negative or more than there are, or a ring has lost keys that the next token
                would see: more than `rollback` tokens would go.
        """
        require_integer("length", length, minimum=0)
        if length > self.length:
            raise ValueError(f"length must be at most the {self.length} tokens in the cache, got {length}")
        self._since_crop = 0
        if length == 0:
            self.reset()
        if length == self.length:
            return
        least = max(store.least_length() for store in self.stores)
        if length < least:
            raise ValueError(
                f"length must be at least {least}: with rollback = {self.rollback} the rings of local heads "
                f"have lost what a shorter sequence of these {self.length} tokens would see, got {length}"
            )
        for store in self.stores:
            store.crop(length)
        if self._sink_tokens is not None:
            self._sink_tokens.crop(length)
            self._may_record = self._may_record and self._sink_tokens.are_known
        self._update()

    def expect(self, length: int) -> None:
        """Announce that the cache will soon hold `length` tokens, and allocate memory for them at once.

        Raises:
            ValueError: length is more than max_length.
        """
        self._require_room(length)
        for store in self.stores:
            store.expected = length

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        self._accepted = None
        self._since_crop = 0
        self._may_record = False
        self._gpu_kernel.forget()  # steps that were captured may run again
        for store in self.stores:
            store.reset()
        if self._sink_tokens is not None:
            self._sink_tokens.reset()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerCache:
        """Move, or convert, what is kept; returns the cache itself."""
        self._count()
        self._accepted = None
        self._may_record = self._is_counted_on_device = False
        for store in self.stores:
            store.map(lambda x: x.to(device=device, dtype=dtype))
        self._map_batch(lambda x, dim: x.to(device=device))
        return self

    def reorder(self, index: Int[Tensor, " new_batch"]) -> None:
        """Sequence i becomes what index[i] was: for beams, and to select or drop sequences."""
        self._map_batch(lambda x, dim: x.index_select(dim, index.to(x.device)))

    def repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` of them."""
        self._map_batch(lambda x, dim: x.repeat_interleave(repeats, dim))

    def _map_batch(self, change: Callable[[Tensor, int], Tensor]) -> None:
        self._count()
        self._accepted = None
        for store in self.stores:
            store.map_batch(change)
        if self._sink_tokens is not None:
            self._sink_tokens.map_batch(change)
        self._update()

    def _note(self, segment_ids: Tensor | None, k: Tensor, past: int) -> None:
        if self._sink_tokens is not None:
            self._sink_tokens.note(segment_ids, k, past)

    def _append(self, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> None:
        self._note(segment_ids, k, self.length)
        for store, group in zip(self.stores, self._groups, strict=True):
            store.append(group.of_kv_heads(k.detach()), group.of_kv_heads(v.detach()), self._sink_tokens)

    def _check(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> int | Tensor:
        """Refuse a call before anything is appended; return the number of earlier tokens."""
        if operators.transforms_are_active() or operators.forward_mode_is_on():
            raise ValueError(
                "a LayerCache keeps plain tensors: it cannot be filled inside of torch.func transforms or "
                "forward-mode differentiation; call without a cache there"
            )
        tensors = (k, v) if q is None else (k, v, q)
        # Calls like the last one are not looked at again: in decoding that would take as long as the rest.
        kind = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in (*tensors, *(x for name, x in options.items() if name != "segment_ids"))
        ]
        ids = options["segment_ids"]
        kind.append((ids.ndim, ids.dtype, ids.device) if isinstance(ids, Tensor) else ids)
        if torch.compiler.is_compiling():  # what is checked in a graph costs nothing when it runs
            self._check_all(q, k, v, options)
        elif kind != self._accepted:
            self._check_all(q, k, v, options)
            self._accepted = kind
        past = self.length if q is None else self.begins_at(k.shape[2])
        kv_len = self.max_length if isinstance(past, Tensor) else past + k.shape[2]
        if ids is not None and ids.shape != (k.shape[0], kv_len):
            wanted = k.shape[0], kv_len
            raise ValueError(f"segment_ids must be (batch, kv_len) = {wanted}, got {tuple(ids.shape)}")
        if not isinstance(past, Tensor):
            if is_recording() and not torch.compiler.is_compiling():
                raise ValueError(
                    "a step that is captured in a CUDA graph must take one token, after a call that was not "
                    "captured, from a cache with max_length on a GPU, whose sinks are all known, by the "
                    "backend 'triton', and without round_probabilities or record_past"
                )
            self._require_room(past + k.shape[2])
            if past == 0:
                return past
        if self._sink_tokens is not None:
            self._sink_tokens.require_one_segment()
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise ValueError(
                "q, k and v must not require grad: the cache keeps no gradients of earlier tokens; use "
                "torch.no_grad(), or another cache, such as DynamicCache"
            )
        return past

    def _require_room(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"max_length = {self.max_length} tokens fit into the cache, got {self.length} and "
                f"{length - self.length} more"
            )

    def _check_all(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
        kv_heads = self.layout.num_kv_heads
        given = [("k", k, kv_heads), ("v", v, kv_heads)]
        if q is not None:
            given.append(("q", q, self.layout.num_heads))
        data = self.stores[0].data
        for name, x, heads in given:
            require_tensor(name, x)
            if x.ndim != 4 or x.shape[1] != heads or x.shape[2] != k.shape[2] or x.shape[2] == 0:
                raise ValueError(
                    f"{name} must be (batch, heads, new, head_dim) with {heads} heads, q, k and v of as many "
                    f"new tokens, at least one; got shape {tuple(x.shape)}"
                )
            like = k if data is None else data[0]
            if (x.shape[0], x.shape[3]) != (like.shape[0], like.shape[3]):
                raise ValueError(
                    f"{name} must have the batch and head_dim of the cache, {like.shape[0]} and "
                    f"{like.shape[3]}, got shape {tuple(x.shape)}"
                )
            if x.dtype != like.dtype or x.device != like.device:
                raise ValueError(
                    f"{name} must be {like.dtype} on {like.device} as the cache, got {x.dtype} on {x.device}"
                )
        ids = options["segment_ids"]
        if ids is not None:
            require_tensor("segment_ids", ids)
            ids = ids[:, -k.shape[2] :]
        # attention's own checks, on the new tokens alone
        query = k.new_empty(k.shape[0], self.layout.num_heads, *k.shape[2:]) if q is None else q
        new_options: Any = {**options, "segment_ids": ids}
        check_call(query, k, v, self.layout, **new_options)

    def _record(self, new: int) -> None:
        """Let the rings hold what was appended since the last crop, at most `_RECORDED` tokens."""
        self._since_crop = min(self._since_crop + new, _RECORDED)
        if self._since_crop > self.rollback:
            self.rollback = max(min(2 * self.rollback, _RECORDED), self._since_crop)
            for store in self.stores:
                store.set_rollback(self.rollback)

    def _prepare(self, k: Tensor, backend: str = "auto", round_probabilities: bool = False) -> None:
        """Make the cache ready for steps of one token that are compiled or captured, where they can be."""
        is_served = backend in ("auto", "triton") and not round_probabilities and not is_recording()
        self._may_record = (
            self.max_length is not None
            and self.counts_on_device
            and not self.record_past
            and (self._sink_tokens is None or self._sink_tokens.are_known)
            and is_served
            and triton.supports_cached(k, self.max_length)
        )
        self._update()

    def _count(self) -> None:
        """Learn the number of tokens from the device, where only the device knows it."""
        if not self._is_counted_on_device or self.stores[0].data is None:
            return
        if is_recording():
            raise ValueError(
                "a cache whose steps are compiled or captured in a CUDA graph takes one token in each of "
                "them; for more tokens call what is neither compiled nor captured"
            )
        length = self._gpu_kernel.read_length()
        if length != self.stores[0].length:
            for store in self.stores:
                store.adopt(length, self._sink_tokens)

    def _update(self) -> None:
        """Tell the device what the host knows."""
        is_needed = self._may_record or self._is_counted_on_device
        if is_needed and self.stores[0].data is not None and not is_recording():
            self._gpu_kernel.prepare(self.stores)

    def _kernel(self, q: Tensor, backend: str, round_probabilities: bool) -> CacheKernel | None:
        """Return the kernel for new tokens, or None if there is none for them."""
        if round_probabilities:
            return None
        asked = (kernel for kernel in self._kernels if backend in ("auto", kernel.backend))
        return next((kernel for kernel in asked if kernel.supports(q, self.stores)), None)

    def _attend_by_kernel(
        self, kernel: CacheKernel, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """All groups in one call, which appends too."""
        new = q.shape[2]
        if self.layout.sink_tokens:
            for store, group in zip(self.stores, self._groups, strict=True):
                store.move_sinks(group.of_kv_heads(k), group.of_kv_heads(v), self._sink_tokens)
        for store in self.stores:
            store.reserve(new)
        sink_positions = None if self._sink_tokens is None else self._sink_tokens.positions
        found = kernel.attend(q, k, v, self.stores, sink_positions, options)
        for store in self.stores:
            store.advance(new)
        return _with_sinks(found, options["sink_logits"], q.dtype)

    def _attend_in_recording(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], past: Tensor
    ) -> Tensor:
        """One token in a step that is compiled or captured."""
        if options["backend"] not in ("auto", "triton") or options["round_probabilities"]:
            raise ValueError(
                "backend must be 'auto' or 'triton', without round_probabilities, as in the cache's last "
                f"call, where the step is compiled or captured; got {options['backend']!r}"
            )
        self._is_counted_on_device = True
        positions = None
        if self._sink_tokens is not None:
            self._sink_tokens.note_on_device(options["segment_ids"], past)
            positions = self._sink_tokens.positions
        slots = max(store.tensors()[0].shape[3] for store in self.stores)
        found = self._gpu_kernel.attend_prepared(q, k, v, slots, positions, options)
        return _with_sinks(found, options["sink_logits"], q.dtype)

    def _attend_by_group(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """One call of attention for each window."""
        out = torch.empty_like(q)
        for store, group in zip(self.stores, self._groups, strict=True):
            per_head = {name: options[name] for name in ("alibi_slopes", "sink_logits")}
            own = {name: None if x is None else x[group.heads] for name, x in per_head.items()}
            new = (q[:, group.heads], group.of_kv_heads(k), group.of_kv_heads(v))
            out[:, group.heads] = attend_to_store(store, group, *new, self._sink_tokens, {**options, **own})
        return out


def _with_sinks(
    found: tuple[Tensor, Tensor | None], sink_logits: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the output of a kernel, with sink logits where there are some."""
    out, lse = found
    if sink_logits is None:
        return out
    assert lse is not None
    return with_sink_logits(out, lse, sink_logits.float()).to(dtype)
