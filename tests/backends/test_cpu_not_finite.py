"""NaN and inf in the C++ kernels: a row depends on what it sees, and on nothing else, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.attention_cases import Case, random_case, visibility
from tests.backends.test_cpu import normal_case, run_python
from torch import Tensor

from longshort import HeadLayout, attention
from longshort.backends import cpu
from longshort.cache import LayerCache

PLACES = ["q", "k", "v", "grad_out", "grad_lse"]


@dataclass
class Inputs:
    """Of a call, and the gradients of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(case.q.shape, generator=generator).to(dtype)
        grad_lse = torch.randn(case.q.shape[:3], generator=generator)
        return cls(case.q.to(dtype), case.k.to(dtype), case.v.to(dtype), grad_out, grad_lse)

    def planted(self, place: str, at: Tensor, dim: int | slice, value: float) -> Inputs:
        """With a value in dimension `dim` of the rows `at`, a mask of (batch, heads, length)."""
        changed = getattr(self, place).clone()
        if changed.dim() == 3:
            changed[at] = value
        else:
            changed[..., dim][at] = value
        return replace(self, **{place: changed})


def results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Of both passes, and of decoding where there are few queries."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    call: dict[str, Any] = {"layout": case.layout, "backend": "cpu", "return_stats": True, **case.options}
    out, stats = attention(q, k, v, **call)
    gradients = torch.autograd.grad((out, stats.lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))
    named = {"out": out, "lse": stats.lse, "max_logit": stats.max_logit, "entropy": stats.entropy}
    named |= dict(zip(("grad_q", "grad_k", "grad_v"), gradients, strict=True))
    if q.shape[2] <= 8:
        with torch.no_grad():
            out, stats = attention(q, k, v, **call)
        named |= {
            "decoded out": out,
            "decoded lse": stats.lse,
            "decoded max_logit": stats.max_logit,
            "decoded entropy": stats.entropy,
        }
    return {name: x.detach() for name, x in named.items()}


def require_same(name: str, ours: Tensor, expected: Tensor, where: Tensor) -> None:
    assert torch.equal(ours[where], expected[where]), f"{name} changed where nothing is seen of it"


def require_nan(name: str, ours: Tensor, where: Tensor) -> None:
    assert ours[where].isnan().all(), f"{name} is a number where NaN is seen"


def check_planted(case: Case, inputs: Inputs, visible: Tensor, place: str, at: Tensor, value: float) -> None:
    """Plants a value in the rows `at` of a tensor; what may not change does not, and what must be NaN is."""
    dim = random.Random(int(at.sum())).choice([slice(None), 0, -1])
    group = case.layout.group_size
    planted = inputs.planted(place, at, dim, value)
    before, after = results(case, inputs), results(case, planted)
    if place in ("k", "v"):
        touched = (visible & at.repeat_interleave(group, 1)[:, :, None]).any(-1)
    else:
        touched = visible.any(-1) & at
    reached = (visible & touched[..., None]).any(2).unflatten(1, (-1, group)).any(2)  # keys of these rows
    heads = touched.any(2).any(0)
    of_scores, of_results = place in ("q", "k"), place in ("q", "k", "v")
    for name in after:
        ours, expected = after[name], before[name]
        if name.startswith("grad_"):
            where = touched if name == "grad_q" else reached
            changes = name != "grad_v" or place not in ("v", "grad_lse")
        elif name.endswith(("out", "lse")):
            where, changes = touched, of_scores or (of_results and name.endswith("out"))
        else:
            where, changes = heads, of_scores
        require_same(name, ours, expected, ~where if changes else torch.ones_like(where))
        if value != value and changes:
            of_one_dim = (name.endswith("out") and place == "v") or (name == "grad_v" and place == "grad_out")
            require_nan(name, ours[..., dim] if of_one_dim else ours, where)


def check_case(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Every place and value, in a few rows or in all that nothing sees."""
    rng = random.Random(seed)
    visible = visibility(case)
    inputs = Inputs.of(case, dtype)
    group = case.layout.group_size
    generator = torch.Generator().manual_seed(seed)
    for place in PLACES:
        rows = getattr(inputs, place).shape[:3]
        at = torch.rand(rows, generator=generator) < rng.choice([0.0, 2 / max(rows[2], 2), 0.5])
        if rng.random() < 0.5:  # with all that have nothing to say
            unseen = ~visible.any(2).unflatten(1, (-1, group)).any(2)
            at |= unseen if place in ("k", "v") else ~visible.any(-1)
        check_planted(case, inputs, visible, place, at, rng.choice([torch.nan, torch.inf, -torch.inf]))
        check_planted(case, inputs, visible, place, at, torch.nan)


def check_random_calls(seeds: range) -> None:
    for seed in seeds:
        case = random_case(seed, max_length=150 if seed % 8 == 0 else 70, logit_scale=1.0 if seed % 5 else 35)
        if seed % 3 == 0:
            case.q = case.q[:, :, -(1 + seed % 7) :]
        check_case(case, seed, torch.bfloat16 if seed % 4 == 0 else torch.float32)


@pytest.mark.parametrize("block", range(4))
def test_random_calls(block: int):
    check_random_calls(range(12_000 + 15 * block, 12_015 + 15 * block))


@pytest.mark.slow
@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_many_random_calls_of_each_instruction_set(name: str):
    code = "from tests.backends.test_cpu_not_finite import *; check_random_calls(range(20_000, 20_200))"
    run_python(f"{code}; print(cpu.instruction_set())", LONGSHORT_CPU=name)


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_random_calls_of_each_instruction_set(name: str):
    code = "from tests.backends.test_cpu_not_finite import *; check_random_calls(range(13_000, 13_015))"
    assert run_python(f"{code}; print(cpu.instruction_set())", LONGSHORT_CPU=name) == name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "head_dim"),
    [(300, 700, 64), (515, 515, 16), (3, 1100, 128), (65, 130, 80), (257, 257, 200)],
)
def test_lengths_around_the_blocks(q_len: int, kv_len: int, head_dim: int, causal: bool):
    layout = HeadLayout((1, 1, 16, 16, 100, 100, None, None), num_kv_heads=4, sink_tokens=kv_len % 3)
    options = {"softcap": 9.0, "alibi_slopes": torch.linspace(-0.9, 0.9, 8)} if q_len == 65 else {}
    check_case(normal_case(kv_len, layout, q_len, kv_len, head_dim, causal=causal, **options), kv_len)


def test_padding_and_other_documents():
    case = normal_case(1, HeadLayout((70, None), sink_tokens=3), 290, 300, 16)
    ids = torch.zeros(2, 300, dtype=torch.int64)
    ids[0, 130:] = 4
    ids[1, 7:200] = -1
    ids[1, 250:] = 5
    case.options["segment_ids"] = ids
    check_case(case, 1)


def test_the_largest_logit_is_nan_beside_inf():
    q, k, v = torch.ones(3, 1, 1, 12, 4).unbind()
    k[..., 3, :], k[..., 5, :] = torch.inf, torch.nan
    for queries in (q, q[:, :, -1:]):
        with torch.no_grad():
            _, stats = attention(queries, k, v, HeadLayout((None,)), backend="cpu", return_stats=True)
        assert stats.max_logit.isnan().all()


def test_an_infinite_logit_is_the_largest():
    q, k, v = torch.ones(3, 1, 2, 12, 4).unbind()
    k[..., 3, :] = -torch.inf
    for queries in (q, q[:, :, -1:]):
        with torch.no_grad():
            out, stats = attention(queries, k, v, HeadLayout((2, None)), backend="cpu", return_stats=True)
        assert stats.max_logit.tolist() == [torch.inf if queries is q else 2.0, torch.inf]
        assert out.isfinite().all()  # exp(-inf) is 0


def test_inputs_that_are_nan_throughout():
    x = torch.full((1, 2, 600, 64), torch.nan, requires_grad=True)
    out, stats = attention(x, x, x, HeadLayout((64, None)), backend="cpu", return_stats=True)
    gradient = torch.autograd.grad(out.sum(), x)[0]
    assert all(y.isnan().all() for y in (out, stats.lse, stats.max_logit, stats.entropy, gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_a_cache_whose_unused_memory_is_nan(dtype: torch.dtype, sink_tokens: int):
    """Rings before and after their first turn, with rollback."""
    layout = HeadLayout((4, 4, None, None), num_kv_heads=2, sink_tokens=sink_tokens)
    generator = torch.Generator().manual_seed(0)

    def outputs(poisoned: bool) -> list[Tensor]:
        generator.manual_seed(0)
        cache = LayerCache(layout, rollback=3, max_length=40)
        outs = []
        for step in range(16):
            q = torch.randn(2, 4, 1 + step % 2, 24, generator=generator).to(dtype)
            k, v = torch.randn(2, 2, 2, 1 + step % 2, 24, generator=generator).to(dtype).unbind()
            outs.append(cache.attend(q, k, v))
            if step % 5 == 4:
                cache.crop(cache.length - 2)
            for store in cache.stores:
                if poisoned and store.data is not None:
                    poison_unused(store.data, store.first, store.length, store.ring)
        return outs

    for ours, expected in zip(outputs(True), outputs(False), strict=True):
        assert torch.equal(ours, expected)


def poison_unused(data: Tensor, first: int, length: int, ring: int) -> None:
    used = {position % ring if ring else position for position in range(first, length)}
    unused = [slot for slot in range(data.shape[3]) if slot not in used]
    data[:, :, :, unused] = torch.nan


@pytest.mark.parametrize("place", ["k", "v"])
@pytest.mark.parametrize(("sink_tokens", "rollback"), [(0, 0), (2, 0), (0, 4), (2, 4)])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_token_in_a_cache_is_forgotten_with_its_window(
    place: str, sink_tokens: int, rollback: int, padding: int
):
    """Tokens of NaN: rows that see them are NaN, and those before and after are not changed by a bit."""
    layout = HeadLayout((3, 5), sink_tokens=sink_tokens)
    q, k, v = torch.randn(3, 1, 2, 60, 16).unbind()
    options = {"segment_ids": torch.arange(60)[None].ge(padding).long() - 1} if padding else {}
    visible = visibility(Case(q, k, v, layout, options))
    bad = [*range(padding), 7, 17, 33, 34]
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[place][:, :, bad] = torch.nan
    caches = LayerCache(layout, rollback), LayerCache(layout, rollback)
    start, step = 0, 9
    while start < 58:
        end = start + step
        ids: dict[str, Any] = {name: x[:, :end] for name, x in options.items()}
        rows = slice(start, end)
        expected = caches[0].attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], **ids)
        given = (poisoned[name][:, :, rows] for name in ("k", "v"))
        ours = caches[1].attend(q[:, :, rows], *given, **ids)
        sees = visible[:, :, rows, bad].any(-1)
        assert torch.equal(ours[~sees], expected[~sees])
        assert ours[sees].isnan().all()
        # without room in the ring, the kernels serve one token at a time
        start, step = end, 1 + end % 3 if rollback or not sink_tokens else 1
