"""Models across ranks, what they exchange, and ranks that disagree."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longshort import HeadLayout
from longshort.distributed import (
    ContextParallel,
    Traffic,
    context_attention,
    keep_exchanges,
    plan_context,
    take_part,
)
from longshort.distributed.exchange import Pending
from longshort.model import LongShortConfig, LongShortForCausalLM

_LAYOUT = HeadLayout.split(12, 1, 100)


class Counting(TorchDispatchMode):
    """Counts the collectives, and the bytes that this rank sends to others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if "all_to_all_single" in name:
            sizes = list(args[2])
            self.bytes += (sum(sizes) - sizes[dist.get_rank()]) * args[0].element_size()
            self.calls += 1
        elif "all_gather_into_tensor" in name:
            self.bytes += args[0].numel() * args[0].element_size() * (args[1] - 1)
            self.calls += 1
        else:
            assert "c10d" not in name or "wait_tensor" in name, name
        return function(*args, **(kwargs or {}))


def traffic() -> tuple[float, float]:
    """Count the bytes sent forward and backward by one layer of the paper's shape."""
    length, ranks = 4096, dist.get_world_size()
    q, k, v = (torch.randn(1, 12, length // ranks, 64, requires_grad=True) for _ in range(3))
    plan = plan_context(ranks, length)
    with Counting() as forward:
        out = context_attention(q, k, v, _LAYOUT, plan=plan, check=False)
    with Counting() as backward:
        out.sum().backward()
    return forward.bytes, backward.bytes


def test_bytes_are_those_of_the_plan() -> None:
    counted = run_ranks(traffic, 4)
    planned = plan_context(4, 4096).traffic(_LAYOUT, 64, 4)
    for (forward, _), plan in zip(counted, planned, strict=True):
        assert forward == plan.total
    mean = Traffic.mean(planned).total
    assert 0.98 * mean <= sum(backward for _, backward in counted) / 4 <= 1.02 * mean


def recomputed() -> list[tuple[int, torch.Tensor]]:
    """Compute gradients without and with checkpointing, and count collectives in the backward pass."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layout = HeadLayout((3, 3, None), sink_tokens=1)
    whole = torch.randn(3, 1, 3, 8 * ranks, 4, generator=torch.Generator().manual_seed(0))
    found = []
    ways: list[dict[str, Any] | None] = [{}, {"context_fn": keep_exchanges()}, None]
    for options in ways:
        q, k, v = (x.clone().requires_grad_() for x in take_part(whole, rank, ranks, dim=3))

        def attend(q: Any, k: Any, v: Any) -> Any:
            return context_attention(q, k, v, layout, plan=plan_context(ranks, 8 * ranks), check=False).sin()

        out = (
            attend(q, k, v)
            if options is None
            else checkpoint(attend, q, k, v, use_reentrant=False, **options)
        )
        with Counting() as backward:
            out.sum().backward()
        found.append((backward.calls, torch.cat([x.grad for x in (q, k, v) if x.grad is not None])))
    return found


def test_checkpointing_keeps_what_was_exchanged() -> None:
    for (repeated, again), (kept, same), (plain, expected) in run_ranks(recomputed, 2):
        assert kept == plain > 0
        assert repeated > plain
        assert torch.equal(again, expected)
        assert torch.equal(same, expected)


def disagreements() -> list[str]:
    """Call with something different on rank 1; return what each rank says."""
    is_odd = dist.get_rank() == 1
    q = torch.randn(1, 2, 8, 4)
    short = q[:, :, :7] if is_odd else q
    layout, other = HeadLayout((2, None)), HeadLayout((3, None))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    plans = [plan_context(2, 16, batch=batch) for batch in (1, 2)]
    unlike: Any = context_attention  # what a type checker would refuse
    leaf = q.clone().requires_grad_()
    context = ContextParallel(gather_memory=1 if is_odd else None)
    calls: list[Any] = [
        lambda: context_attention(short, short, short, layout),
        lambda: context_attention(q, q, q, other if is_odd else layout),
        lambda: context_attention(q.clone().requires_grad_(is_odd), q, q, layout),
        lambda: context_attention(q, q, q, layout, segment_ids=ids if is_odd else None),
        lambda: context_attention(q, q, q, layout, scale=0.5 if is_odd else 0.25),
        lambda: context_attention(q, q, q[:, :1] if is_odd else q, layout),
        lambda: context_attention(q, q, q, layout, causal=False),
        lambda: context_attention(q, q, q, HeadLayout((2, 2), sink_tokens=1), alibi_slopes=torch.ones(2)),
        lambda: context_attention(q, q, q, layout, gather_memory=0, alibi_slopes=torch.ones(2)),
        lambda: context_attention(q, leaf, q, layout) if is_odd else context_attention(leaf, q, q, layout),
        lambda: context_attention(q, q, q, layout, gather_memory=1 if is_odd else None),
        lambda: context_attention(q, q, q, layout, lend=not is_odd),
        lambda: context_attention(q, q, q, layout, causal=not is_odd),
        lambda: unlike(q, None if is_odd else q, q, layout),
        lambda: unlike(q, q[0] if is_odd else q, q, layout),
        lambda: context_attention(q, q, q, layout, plan=plans[is_odd]),
        lambda: context_attention(q, q, q, layout, plan=plans[0], segment_ids=ids),
        lambda: context.sequence(1, 16).__enter__(),
        lambda: ContextParallel().sequence(1, 16, unlike if is_odd else None).__enter__(),
    ]
    found = []
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        found.append(str(caught.value))
    # the ranks are still together, and agree on options in another order
    options: dict[str, Any] = {"scale": 0.5, "softcap": 2.0}
    ordered: dict[str, Any] = dict(reversed(options.items())) | {"sink_logits": None} if is_odd else options
    assert unlike(q, q, q, layout, **ordered).shape == q.shape
    return found


def test_ranks_that_disagree_all_raise() -> None:
    first, odd = run_ranks(disagreements, 2)
    for text, part in zip(
        first,
        (
            "shape of q must be the same on all ranks, got (1, 2, 8, 4) on rank 0 and (1, 2, 7, 4) on rank 1",
            "layout must be the same on all ranks",
            "requires_grad of q must be the same on all ranks, got False on rank 0 and True on",
            "segment_ids must be the same on all ranks, got 'none' on rank 0 and 'given' on rank 1",
            "scale must be the same on all ranks, got 0.25 on rank 0 and 0.5 on rank 1",
            "the error must be the same on all ranks, got None on rank 0 and ValueError",
            "causal must be True across ranks, got False",
            "alibi_slopes do not go with sink_tokens across ranks",
            "alibi_slopes do not go with a ring",
            "requires_grad of q must be the same on all ranks, got True on rank 0 and False on rank 1",
            "gather_memory must be the same on all ranks, got None on rank 0 and 1 on rank 1",
            "lend must be the same on all ranks, got True on rank 0 and False on rank 1",
            "the error must be the same on all ranks, got None on rank 0 and ValueError",
            "the error must be the same on all ranks, got None on rank 0 and TypeError",
            "the error must be the same on all ranks, got None on rank 0 and ValueError",
            "the error must be the same on all ranks, got None on rank 0 and ValueError",
            "segment_ids must be None with a plan",
            "gather_memory must be the same on all ranks",
            "segment_ids must be",
        ),
        strict=True,
    ):
        assert part in text
    assert "v must be" in odd[5]


def other_models() -> list[float]:
    """Return how far a decoder of transformers across ranks is from one process: loss and gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from longshort.huggingface import LogitMonitor, apply, distribute

    context = ContextParallel()
    found: list[float] = []
    for num_kv_heads in (4, 2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=num_kv_heads, max_position_embeddings=64,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        apply(model, num_global_heads=2, window=5, sink_tokens=2)
        ids = torch.randint(0, 32, (2, 23))
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        model(ids, shift_labels=labels, labels=ids, use_cache=False).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        distribute(model, context)
        with context.sequence(2, 23):
            part = context.inputs(ids, labels)
            part.pop("segment_ids")
            loss = model(**part, labels=part["input_ids"], use_cache=False).loss
            loss.backward()
        with LogitMonitor(model), pytest.raises(ValueError, match="cut across ranks"):
            model(ids[:, :12], use_cache=False)
        for parameter, one in zip(model.parameters(), expected, strict=True):
            dist.all_reduce(parameter.grad)
            error = (parameter.grad / context.ranks - one).norm() / one.norm().clamp_min(1e-6)
            found.append(float(error))
    return found


def test_decoders_of_others_go_across_ranks() -> None:
    for errors in run_ranks(other_models, 2):
        assert max(errors) < 1e-5


def kept_exchanges() -> int:
    """Count the exchanges that are alive after passes whose results are gone, without garbage collection."""
    ranks = dist.get_world_size()
    q = torch.randn(1, 2, 16, 4, requires_grad=True)
    gc.collect()
    gc.disable()
    for _ in range(3):
        context_attention(
            q, q, q, HeadLayout((3, None)), plan=plan_context(ranks, 16 * ranks)
        ).sum().backward()
    return sum(isinstance(found, Pending) for found in gc.get_objects())


def test_exchanges_end_with_their_graph() -> None:
    assert run_ranks(kept_exchanges, 2) == [0, 0]


def misused() -> list[str]:
    """Use models and attention across ranks in ways that would give wrong numbers; return what is said."""
    context = ContextParallel()
    config = LongShortConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, local_window=2,
        num_global_heads=1,
    )  # fmt: skip
    model: Any = LongShortForCausalLM(config).eval()
    context.distribute(model)
    assert copy.deepcopy(model).model.layers[0].attention.function is context
    ids = torch.zeros(1, 4, dtype=torch.int64)
    q = torch.randn(1, 2, 4, 4, requires_grad=True)
    layout = HeadLayout((2, None))

    def second_gradients(**options: Any) -> None:
        out = context_attention(q, q, q, layout, **options)
        torch.autograd.grad(out.square().sum(), q, create_graph=True)

    found = []
    for use in (
        lambda: model(ids, use_cache=True),
        lambda: model(ids, use_cache=False, segment_ids=ids),
        second_gradients,
        lambda: second_gradients(gather_memory=0),
        lambda: plan_context(2, 8, segment_ids=torch.ones(1, 8, dtype=torch.bool)),
    ):
        with pytest.raises((ValueError, NotImplementedError)) as caught, context.sequence(1, 8):
            use()
        found.append(str(caught.value))
    return found


def test_what_would_give_wrong_numbers_is_refused() -> None:
    for found in run_ranks(misused, 2):
        for text, part in zip(
            found,
            (
                "cache must be None (use_cache=False) while sequences are cut across ranks",
                "segment_ids must be given to `sequence` too",
                "create_graph must be False",
                "create_graph must be False",
                "segment_ids must be integers",
            ),
            strict=True,
        ):
            assert part in text


def refused() -> list[str]:
    context = ContextParallel()
    found = []
    base: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "local_window": 2,
    }
    changes: dict[str, Any]
    for changes in (
        {"short_convolution": 3},
        {"attention_precision": "sdpa-bf16"},
        {"sink_tokens": 1, "position_embedding": "alibi"},
    ):
        with pytest.raises(ValueError) as caught:
            context.distribute(LongShortForCausalLM(LongShortConfig(num_global_heads=1, **base, **changes)))
        found.append(str(caught.value))
    return found


def test_layers_that_cannot_go_across_ranks_are_refused() -> None:
    convolution, flash, alibi = run_ranks(refused, 1)[0]
    assert "short_convolution does not go with context parallelism" in convolution
    assert "sdpa-bf16 does not go with context parallelism" in flash
    assert "alibi_slopes do not go with sink_tokens" in alibi
