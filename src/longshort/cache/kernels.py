"""The kernels that append to a cache and attend to all of its stores in one call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longshort.backends import cpu, triton

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longshort.cache.store import Store
    from longshort.layout import HeadLayout


class CacheKernel:
    """Base class of the kernels for one layer.

    Args:
        layout: of the layer's heads.

    Attributes:
        backend: name of the backend that the kernel belongs to.
    """

    backend: str

    def __init__(self, layout: HeadLayout) -> None:
        self._layout = layout
        group_of = {head: i for i, group in enumerate(layout.groups) for head in group.kv_heads}
        self._group_of = [group_of[head] for head in range(layout.num_kv_heads)]
        self._versions: list[int] | None = None
        self._described: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without addresses, since a copy of the cache has its own tensors."""
        return {**self.__dict__, "_versions": None, "_described": None}

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
            stores: of all groups of heads; the caller advances them.
            sink_positions: (batch, n), of the sinks of each sequence, -1 for none; None: no sinks.
            options: those of `LayerCache.attend`.

        Returns:
            out, and with sink logits the natural log of the sum of exp(score).
        """
        raise NotImplementedError

    def _describe(self, stores: Sequence[Store]) -> Any:
        raise NotImplementedError

    def _description(self, stores: Sequence[Store]) -> Any:
        """The stores as the kernel takes them, found anew when a tensor has moved."""
        versions = [store.version for store in stores]
        if versions != self._versions:
            self._versions, self._described = versions, self._describe(stores)
        return self._described


class CPUKernel(CacheKernel):
    """The C++ kernel of the backend `cpu`, for a few new tokens."""

    backend = "cpu"

    def __init__(self, layout: HeadLayout) -> None:
        super().__init__(layout)
        self._windows = cpu.windows_of_kv_heads(layout)

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
        return cpu.attend_cached(q, k, v, self._description(stores), *rest)

    def _describe(self, stores: Sequence[Store]) -> list[tuple[int, ...]]:
        return [cpu.describe_store(*store.tensors(), store.ring) for store in stores]


class TritonKernel(CacheKernel):
    """The decoding kernels of the backend `triton`, for one new token."""

    backend = "triton"

    def supports(self, q: Tensor, stores: Sequence[Store]) -> bool:
        return q.shape[2] == 1 and triton.supports_cached(q, stores[0].length + 1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stores: Sequence[Store],
        sink_positions: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        from longshort.backends.triton import cached

        if torch.compiler.is_compiling():
            rings, lost = [store.ring for store in stores], [store.lost for store in stores]
            return torch.ops.longshort.triton_attend_cached(
                q, k, v, *_tensors(stores), rings, lost, self._group_of, sink_positions,
                triton.windows_of_kv_heads(self._layout), stores[0].length, *_common(q, options),
            )  # fmt: skip
        table, windows = self._description(stores)
        slots = max(min(store.tensors()[0].shape[3], store.length) for store in stores)
        return cached.attend_cached(
            q, k, v, table, slots, sink_positions, windows, stores[0].length, *_common(q, options)
        )

    def _describe(self, stores: Sequence[Store]) -> tuple[Tensor, Tensor]:
        from longshort.backends.triton import cached

        rings, lost = [store.ring for store in stores], [store.lost for store in stores]
        table = cached.describe_stores(*_tensors(stores), rings, lost, self._group_of)
        return table, cached.table_of(tuple(triton.windows_of_kv_heads(self._layout)), table.device)


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
