"""`ContextParallel`: models whose attention layers attend across ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longshort.attention import attention, require_tensor
from longshort.checks import require_integer
from longshort.distributed.agreement import require_agreement
from longshort.distributed.attention import context_attention, plan_of_parts, refusal
from longshort.distributed.exchange import gather
from longshort.distributed.message import Message
from longshort.distributed.partition import padded_segments, part_length, part_positions, take_part
from longshort.distributed.plan import ContextPlan, plan_context
from longshort.layers import LongShortAttention, Observation
from longshort.layout import HeadGroup, HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Int

_IGNORED = -100  # torch's label of a position that nothing is predicted for


class ContextParallel:
    """The attention of a model across the ranks of a group, each of which holds one part of every sequence.

        context = ContextParallel(group)
        context.distribute(model)
        with context.sequence(batch, length, segment_ids):
            inputs = context.inputs(input_ids, labels, segment_ids)
            model(**inputs).loss.backward()

    It is called as `attention` is, by the layers.

    Args:
        group: the ranks, in the order of the parts; None: all processes.
        gather_memory: bytes that the gathered keys and values of a layer's global heads may take; beyond that
            they go round in a ring. None: any.
        lend: let ranks with more visible pairs lend queries of global heads to ranks with fewer.
        check: compare the calls of all ranks, once for each `sequence`, or for each call outside of it.

    Attributes:
        group: the ranks.
        rank: number of this rank in the group.
        ranks: size of the group.

    Raises:
        ValueError: gather_memory is not an integer >= 0, or there is no group.
    """

    is_across_ranks = True
    """Layers look at it: a part of a sequence has no cache."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        gather_memory: int | None = None,
        lend: bool = True,
        check: bool = True,
    ) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("group must be given, or torch.distributed initialized, got neither")
        if gather_memory is not None:
            require_integer("gather_memory", gather_memory, minimum=0)
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self._gather_memory, self._lend, self._check = gather_memory, lend, check
        self._plan: ContextPlan | None = None

    def distribute(self, model: nn.Module) -> None:
        """Let the `LongShortAttention` layers of a model attend across the ranks; all ranks call it.

        Raises:
            ValueError: the model has no such layer or one that does not attend across ranks, or the layers
                are not the same on all ranks.
        """
        layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
        if not layers:
            raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
        for layer in layers:
            _require_servable(layer)
        facts = {
            "the layouts of the layers": [layer.layout for layer in layers],
            "requires_grad of the parameters": [parameter.requires_grad for parameter in model.parameters()],
        }
        require_agreement(facts, self.group, self.device)
        for layer in layers:
            layer.function = self  # pyright: ignore[reportAttributeAccessIssue]  # it is called alike

    def release(self, model: nn.Module) -> None:
        """Let the layers of a model attend on one rank again."""
        for module in model.modules():
            if isinstance(module, LongShortAttention) and module.function is self:
                module.function = attention

    def plan(self, batch: int, length: int, segment_ids: Tensor | None = None) -> ContextPlan:
        """Plan a batch of sequences of `length` tokens, which is padded to equal parts.

        Args:
            batch: sequences.
            length: tokens of each.
            segment_ids: (batch, length), of the whole sequences; on the CPU, or else a GPU is waited for.

        Raises:
            ValueError: an argument is out of its range.
        """
        padded = padded_segments(
            None if segment_ids is None else segment_ids.cpu(), batch, length, self.ranks
        )
        whole = part_length(length, self.ranks) * self.ranks
        return plan_context(self.ranks, whole, batch=batch, segment_ids=padded, lend=self._lend)

    @contextmanager
    def sequence(
        self, batch: int, length: int, segment_ids: Int[Tensor, "batch length"] | None = None
    ) -> Iterator[ContextPlan]:
        """Let the passes inside be of these sequences, so that layers need neither plan nor compare.

        The backward pass belongs inside too. The arguments are those of `plan`.

        Raises:
            ValueError: an argument is out of its range, or the ranks disagree, on every rank alike.
        """
        plan, error = None, None
        try:
            if segment_ids is not None:
                require_tensor("segment_ids", segment_ids)
            plan = self.plan(batch, length, segment_ids)
        except (TypeError, ValueError) as caught:
            error = caught
        if self._check:
            facts = {
                "the error": error,
                "(batch, length)": (batch, length),
                "segment_ids": None if plan is None else plan.digest,
                "grad mode": torch.is_grad_enabled(),
                "gather_memory": self._gather_memory,
                "lend": self._lend,
            }
            try:
                require_agreement(facts, self.group, self.device)
            except ValueError as difference:
                raise (error or difference) from None
        if error is not None:
            raise error
        assert plan is not None
        before, self._plan = self._plan, plan
        try:
            yield plan
        finally:
            self._plan = before

    def inputs(
        self,
        input_ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"] | None = None,
        segment_ids: Int[Tensor, "batch length"] | None = None,
    ) -> dict[str, Any]:
        """Return the arguments with which a causal language model computes this rank's part.

        Args:
            input_ids: the input ids of the whole sequences, equal on all ranks.
            labels: already shifted, -100 where nothing is predicted. With them, the mean of the loss over the
                ranks is the mean over all labels, and so is that of the gradients.
            segment_ids: the segment ids of the whole sequences; negative is padding.

        Returns:
            `input_ids`, `position_ids` and, where needed, `segment_ids`, `shift_labels` and
            `num_items_in_batch`.
        """
        batch, length = input_ids.shape
        cut = {"rank": self.rank, "ranks": self.ranks}
        found: dict[str, Any] = {
            "input_ids": take_part(input_ids, **cut),
            "position_ids": part_positions(length, self.rank, self.ranks, input_ids.device),
        }
        padded = padded_segments(segment_ids, batch, length, self.ranks)
        if padded is not None:
            found["segment_ids"] = take_part(padded, **cut).to(input_ids.device)
        if labels is not None:
            found["shift_labels"] = take_part(labels, **cut, fill=_IGNORED).contiguous()
            found["num_items_in_batch"] = (labels != _IGNORED).sum() / self.ranks
        return found

    def whole(self, part: Tensor, length: int) -> Tensor:
        """Gather a result by token, (batch, part, ...), from all ranks, without gradients."""
        return gather(part, self.group).movedim(0, 1).flatten(1, 2)[:, :length]

    @torch.compiler.disable
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: HeadLayout,
        *,
        segment_ids: Tensor | None = None,
        return_stats: bool = False,
        **options: Any,
    ) -> Any:
        """Attend across the ranks; see `context_attention`."""
        plan = self._plan_for(q.shape[0], q.shape[2])
        if plan is not None and plan.segment_ids is None and segment_ids is not None:
            raise ValueError("segment_ids must be given to `sequence` too, which was told of none")
        return context_attention(
            q, k, v, layout, group=self.group, plan=plan, segment_ids=segment_ids if plan is None else None,
            gather_memory=self._gather_memory, lend=self._lend, return_stats=return_stats,
            check=self._check and plan is None, **options,
        )  # fmt: skip

    @torch.no_grad()
    def with_earlier_keys(self, observation: Observation, count: int) -> Observation:
        """Return an observation whose keys begin up to `count` earlier than this rank's part.

        All ranks must call it. The earlier keys come from the other ranks, for all heads.
        """
        q, k, v = observation.q, observation.k, observation.v
        own_ids = observation.options.get("segment_ids")
        plan = self._plan_for(q.shape[0], q.shape[2])
        if plan is None:
            plan = plan_of_parts(own_ids, q.shape[0], q.shape[2], self.group)
        plan = replace(plan, blocks=())
        kv_heads = tuple(range(k.shape[1]))
        everything = HeadLayout((count + 1,) * len(kv_heads))
        message = Message(plan, everything, self.rank, self.group, q.shape[3])
        message.begin(q, k, v)
        keys, values = message.end().earlier_keys(0, 0, torch.stack([k, v]))
        start = plan.halo(HeadGroup(count + 1, kv_heads, kv_heads), 0, self.rank).start
        options = dict(observation.options)
        if plan.segment_ids is not None:
            options["segment_ids"] = plan.segment_ids[:, start : (self.rank + 1) * plan.part].to(q.device)
        return replace(observation, k=keys, v=values, options=options)

    def _plan_for(self, batch: int, part: int) -> ContextPlan | None:
        """Return the plan of the sequences inside whose context the caller is; None outside of one."""
        plan = self._plan
        if plan is not None and (plan.batch, plan.part) != (batch, part):
            raise ValueError(
                f"q must be a part of the sequence that was announced, (batch, part) = "
                f"{(plan.batch, plan.part)}, got {(batch, part)}"
            )
        return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        """Return itself: a copy of a model stays with the same ranks."""
        return self

    @property
    def device(self) -> torch.device:
        """A device that the group's backend serves, the CPU where it can be."""
        is_cuda = "nccl" in str(dist.get_backend(self.group)) and "gloo" not in str(
            dist.get_backend(self.group)
        )
        return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def _require_servable(layer: LongShortAttention) -> None:
    if layer.short_convolution is not None:
        raise ValueError("short_convolution does not go with context parallelism: it has no halo yet")
    if layer.attention_precision == "sdpa-bf16":
        raise ValueError(
            "attention_precision sdpa-bf16 does not go with context parallelism: PyTorch's flash kernel has "
            "no queries that begin later than the keys"
        )
    refused = refusal(layer.layout, layer.alibi_slopes)
    if refused is not None:
        raise ValueError(refused)
