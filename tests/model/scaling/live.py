"""Memory that torch holds while a block of code runs, and the collectives that it calls."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


class LiveMemory(TorchDispatchMode):
    """Follows the memory of all tensors that operators make.

    Attributes:
        peak: most bytes at one moment.
        sizes: elements of the largest tensor of each call of a collective, by the operator's name.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self.sizes: dict[str, list[int]] = {}
        self._known = {x.untyped_storage()._cdata for x in known}
        self._alive: dict[int, Any] = {}

    @property
    def now(self) -> int:
        """Bytes at this moment: FSDP shrinks what it has gathered, so sizes are asked for anew."""
        storages = [reference() for reference in self._alive.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d." in str(func):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.sizes.setdefault(str(func), []).append(max(x.numel() for x in tensors))
        if func is _EXCHANGE:  # torch's stand-in for a group refuses ranks that only receive
            out = args[0].new_zeros(sum(args[1]))
        else:
            out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._alive:
                    self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))
        self.peak = max(self.peak, self.now)
        return out


@contextmanager
def one_of(ranks: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """Be one rank of a group whose other ranks do not exist: collectives return at once, with any values."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        group: Any = dist.group.WORLD
        yield group
    finally:
        dist.destroy_process_group()
