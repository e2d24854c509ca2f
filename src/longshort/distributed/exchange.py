"""The collectives of context parallelism, differentiable: each begins early and ends where it is needed.

They are the functional operators of torch's own engine: these return at once, graphs and selective
checkpointing know them by name, and a result is waited for by an operator of its own. In the backward pass
the end of an exchange begins the reverse one, and its begin waits for that, so that what lies between the two
overlaps with the exchange there too. Every rank must reach the same exchanges in the same order, forward and
backward: results that a rank does not use still belong into its output, as tensors without elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_OPERATORS = torch.ops._c10d_functional


class Pending:
    """An exchange that has begun: what arrives may be read after its end alone."""

    begin_reverse: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        self.reverse: Tensor | None = None
        self._arriving: Tensor | None = None

    def begun(self, arriving: Any) -> Pending:
        """Keep what arrives, in the graph, and return itself."""
        self._arriving = arriving
        return self

    def take(self) -> Tensor:
        """Return what arrives and forget it: its graph holds this object, which else would hold the graph."""
        assert self._arriving is not None
        arriving, self._arriving = self._arriving, None
        return arriving


def begin_exchange(
    message: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Pending:
    """Begin to send parts of a message to all ranks, and to receive theirs.

    Args:
        message: (sum of send,), the parts for rank 0, 1, ... in order.
        send: elements for each rank.
        receive: elements from each rank.
        group: the ranks.
    """
    pending = Pending()
    return pending.begun(_Begin.apply(message, pending, list(send), list(receive), group.group_name))


def end_exchange(pending: Pending) -> Tensor:
    """Wait for the parts that the ranks sent: (sum of receive,). An exchange ends once."""
    return _End.apply(pending.take(), pending)  # pyright: ignore[reportReturnType]


def begin_gather(part: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to gather a tensor of one shape from all ranks."""
    pending = Pending()
    return pending.begun(_BeginGather.apply(part, pending, group.size(), group.group_name))


def end_gather(pending: Pending) -> Tensor:
    """Wait for the tensors of all ranks: (ranks, elements). A gather ends once."""
    return _End.apply(pending.take(), pending)  # pyright: ignore[reportReturnType]


def gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather a tensor of one shape from all ranks: (ranks, *shape), without gradients."""
    with torch.no_grad():
        return end_gather(begin_gather(part, group)).view(group.size(), *part.shape)


def keep_exchanges() -> Callable[[], Any]:
    """Return a `context_fn` for `torch.utils.checkpoint.checkpoint`: all is recomputed in the backward pass
    but the exchanges, whose results are kept."""
    return partial(create_selective_checkpoint_contexts, _policy)


def _policy(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    kept = (
        _OPERATORS.all_to_all_single.default,
        _OPERATORS.all_gather_into_tensor.default,
        _OPERATORS.wait_tensor.default,
    )
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _all_to_all(message: Tensor, send: list[int], receive: list[int], name: str) -> Tensor:
    return _OPERATORS.all_to_all_single(message.contiguous(), receive, send, name)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, message: Tensor, pending: Any, send: list[int], receive: list[int], name: str
    ) -> Tensor:
        ctx.pending = pending
        pending.begin_reverse = lambda gradient: _all_to_all(gradient, receive, send, name)
        return _all_to_all(message, send, receive, name)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _arrived(ctx.pending), None, None, None, None


class _BeginGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, pending: Any, ranks: int, name: str) -> Tensor:
        ctx.pending = pending
        # each rank gets the others' gradients of its part and adds them up: the bytes of a reduce-scatter
        sizes = [part.numel()] * ranks
        pending.begin_reverse = lambda gradient: _all_to_all(gradient.reshape(-1), sizes, sizes, name)
        ctx.shape = part.shape
        return _OPERATORS.all_gather_into_tensor(part.contiguous().view(1, -1), ranks, name)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        parts = _arrived(ctx.pending).view(gradients[0].shape)
        precise = torch.promote_types(parts.dtype, torch.float32)
        return parts.sum(0, dtype=precise).to(parts.dtype).view(ctx.shape), None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, pending: Any) -> Tensor:
        ctx.pending = pending
        return _OPERATORS.wait_tensor(arriving)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        require_first_derivatives()
        ctx.pending.reverse = ctx.pending.begin_reverse(gradients[0])
        return gradients[0], None  # only carries the order of the graph: what counts is in `pending`


def require_first_derivatives() -> None:
    """Refuse a backward pass that is to be differentiated, on every rank before it sends anything."""
    if torch.is_grad_enabled():
        raise NotImplementedError("create_graph must be False: there are no second gradients across ranks")


def _arrived(pending: Pending) -> Tensor:
    assert pending.reverse is not None
    arrived, pending.reverse = _OPERATORS.wait_tensor(pending.reverse), None
    return arrived
