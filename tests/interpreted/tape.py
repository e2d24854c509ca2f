"""A stand-in for a CUDA graph on a CPU: operators are recorded once, and run again on the same memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Tape(TorchDispatchMode):
    """Operators with their arguments, which `replay` calls again; like in a graph, no value may be read."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise AssertionError(f"{func} reads a value")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again, with results where they were before."""
        for func, args, kwargs, results in self._calls:
            if func.is_view:
                continue
            inputs = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            again = _tensors(func(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if old.numel() and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def recording() -> Iterator[Tape]:
    """Record the operators inside, where the library takes them for a capture."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Tape() as tape:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield tape
