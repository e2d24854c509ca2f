"""The kernels that append to a cache and attend to all of its stores in one call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longshort.backends import cpu, triton
from longshort.key_values import is_recording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longshort.cache.store import Store
    from longshort.layout import HeadLayout


class CacheKernel:
    """Base class of the kernels for one layer.

    Args:
        layout: the layout of the layer's heads.

    Attributes:
        backend: name of the backend that the kernel belongs to.
    """

    backend: str

    def __init__(self, layout: HeadLayout) -> None:
        self._layout = layout
        self._versions: list[int] | None = None
        group_of = {head: i for i, group in enumerate(layout.groups) for head in group.kv_heads}
        self._group_of = [group_of[head] for head in range(layout.num_kv_heads)]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without addresses, since a copy of the cache has its own tensors."""
        return {**self.__dict__, "_versions": None}

    def supports(self, q: Tensor, stores: Sequence[Store]) -> bool:
        """Return whether the kernel can serve queries like q, of new tokens."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stores: Sequence[Store],
        sink_positions: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Write new keys and values to stores that have slots for them, and attend to them all.

        Args:
            q, k, v: of the new tokens.
            stores: the stores of all groups of heads; the caller advances them.
            sink_positions: (batch, n), of the sinks of each sequence, -1 for none; None: no sinks.
            options: the options of `LayerCache.attend`.

        Returns:
            out, and with sink logits the natural log of the sum of exp(score).
        """
        raise NotImplementedError

    def _have_moved(self, stores: Sequence[Store]) -> bool:
        """Whether a tensor has moved since the last call, so that the stores must be described anew."""
        last, self._versions = self._versions, [store.version for store in stores]
        return last != self._versions


class CPUKernel(CacheKernel):
    """The C++ kernel of the backend `cpu`, for a few new tokens."""

    backend = "cpu"

    def __init__(self, layout: HeadLayout) -> None:
        super().__init__(layout)
        self._windows = cpu.windows_of_kv_heads(layout)
        self._described: list[tuple[int, ...]] = []

    def supports(self, q: Tensor, stores: Sequence[Store]) -> bool:
        new = q.shape[2]
        return cpu.supports_cached(q, stores[0].length + new) and (
            new == 1 or not any(store.loses_needed(new) for store in stores)
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stores: Sequence[Store],
        sink_positions: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        rest = (
            [store.next_first(q.shape[2]) for store in stores], self._group_of, self._windows,
            self._layout.sink_tokens, stores[0].length, *_common(q, options),
        )  # fmt: skip
        if torch.compiler.is_compiling():
            data, sinks, positions = _tensors(stores)
            rings = [store.ring for store in stores]
            return torch.ops.longshort.cpu_attend_cached(q, k, v, data, sinks, positions, rings, *rest)
        if self._have_moved(stores):
            self._described = [cpu.describe_store(*store.tensors(), store.ring) for store in stores]
        return cpu.attend_cached(q, k, v, self._described, *rest)


class TritonKernel(CacheKernel):
    """The decoding kernels of the backend `triton`, for one new token.

    They count the tokens on the device. So once `prepare` was called, a step can be compiled, or captured in
    a CUDA graph, and run for each token.

    Args:
        layout: the layout of the layer's heads.
        max_length: the most tokens of the cache. The stores then do not grow, and compilers need not copy
            them to where a CUDA graph looks for them.

    Attributes:
        length: tokens in the cache, (1,) of int64 on the device; None before `prepare`.
    """

    backend = "triton"

    def __init__(self, layout: HeadLayout, max_length: int | None) -> None:
        super().__init__(layout)
        self._max_length = max_length
        self.length: Tensor | None = None
        self._table: Tensor | None = None
        self._windows: Tensor | None = None
        self._counted = -1  # what `length` holds

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "length": None, "_counted": -1}

    def supports(self, q: Tensor, stores: Sequence[Store]) -> bool:
        is_one = q.shape[2] == 1 and not is_recording()
        return is_one and triton.supports_cached(q, stores[0].length + 1)

    def prepare(self, stores: Sequence[Store]) -> None:
        """Tell the device where the stores are, and how many tokens; in the same memory each time."""
        from longshort.backends.triton import cached
        from longshort.backends.triton.launching import table_of

        data, sinks, positions = _tensors(stores)
        device, length = data[0].device, stores[0].length
        if self.length is None or self.length.device != device:
            with torch.inference_mode(False):  # what follows is written to in any mode
                self.length = torch.full((1,), length, device=device)
                shape = self._layout.num_kv_heads, cached.COLUMNS
                self._table = torch.empty(shape, dtype=torch.int64, device=device)
            self._windows = table_of(tuple(triton.windows_of_kv_heads(self._layout)), device)
            self._versions, self._counted = None, length
        assert self._table is not None
        if self._have_moved(stores):
            rings, lost = [store.ring for store in stores], [store.lost for store in stores]
            self._table.copy_(
                cached.describe_stores(data, sinks, rings, lost, self._group_of, self._max_length)
            )
            if self._max_length is not None:
                for tensor in (self.length, self._table, self._windows, *data, *sinks, *positions):
                    torch._dynamo.mark_static_address(tensor, guard=False)
        if length != self._counted:
            self.length.fill_(length)
            self._counted = length

    def forget(self) -> None:
        """Tell the device that there are neither tokens nor stores: a step would give NaN."""
        self._counted = 0
        if self.length is not None and self._table is not None:
            self.length.zero_()
            self._table.zero_()

    def read_length(self) -> int:
        """Return the number of tokens by the device, which this waits for."""
        assert self.length is not None
        self._counted = int(self.length)
        return self._counted

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stores: Sequence[Store],
        sink_positions: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        self.prepare(stores)
        slots = max(min(store.tensors()[0].shape[3], store.length) for store in stores)
        self._counted += 1
        return self.attend_prepared(q, k, v, slots, sink_positions, options)

    def attend_prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: int,
        sink_positions: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Do as `attend`, with what the device was told; `slots` is the most slots that a store may use."""
        from longshort.backends.triton import cached

        assert self._table is not None and self.length is not None and self._windows is not None
        attend = torch.ops.longshort.triton_attend_cached if is_recording() else cached.attend_cached
        return attend(
            q, k, v, self._table, self.length, slots, sink_positions, self._windows, *_common(q, options)
        )


def _tensors(stores: Sequence[Store]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    data, sinks, positions = zip(*(store.tensors() for store in stores), strict=True)
    return list(data), list(sinks), list(positions)


def _common(q: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """Scale, softcap, slopes, segment ids, and whether the lse is needed."""
    scale, slopes, ids = options["scale"], options["alibi_slopes"], options["segment_ids"]
    return (
        1 / math.sqrt(q.shape[3]) if scale is None else scale, options["softcap"],
        None if slopes is None else slopes.float(), None if ids is None else ids.to(torch.int64),
        options["sink_logits"] is not None,
    )  # fmt: skip
