"""NaN and inf reach the rows that see them, and change no bit of anything else."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from tests.attention_cases import RUNNABLE, Case, random_case, visibility
from torch import Tensor

from longshort import HeadLayout, attention

NONFINITE = [torch.nan, torch.inf, -torch.inf]
PLACES = ["q", "k", "v", "grad_out", "grad_lse"]
RUNS = [
    *(pytest.param(name, torch.float32, id=f"{name}-fp32") for name in RUNNABLE),
    *(pytest.param(name, torch.float64, id=f"{name}-fp64") for name in ("blockwise", "reference")),
]


@dataclass
class Results:
    """What a call gives, and the gradients for grad_out and grad_lse."""

    out: Tensor
    lse: Tensor
    max_logit: Tensor
    entropy: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_sinks: Tensor


def tensors_of(case: Case) -> dict[str, Tensor]:
    """q, k, v, and gradients of out and lse, to be changed."""
    generator = torch.Generator().manual_seed(3)
    grad_out = torch.randn(case.q.shape, generator=generator, dtype=torch.float64).to(case.q.dtype)
    grad_lse = torch.randn(case.q.shape[:3], generator=generator, dtype=torch.float64)
    return {"q": case.q, "k": case.k, "v": case.v, "grad_out": grad_out, "grad_lse": grad_lse}


def compute(case: Case, tensors: dict[str, Tensor], backend: str, with_stats: bool = True) -> Results:
    """The call with these tensors; without statistics it may be served by other kernels."""
    q, k, v = (tensors[name].detach().requires_grad_() for name in "qkv")
    heads, options = case.q.shape[1], dict(case.options)
    leaves = [q, k, v]
    if "sink_logits" in options:
        leaves.append(options["sink_logits"].detach().requires_grad_())
        options["sink_logits"] = leaves[3]
    zeros = torch.zeros(heads)
    if with_stats:
        out, stats = attention(q, k, v, case.layout, backend=backend, return_stats=True, **options)
        seeds = [tensors["grad_out"], tensors["grad_lse"].to(stats.lse.dtype)]
        gradients = torch.autograd.grad([out, stats.lse], leaves, seeds)
        others = (stats.lse.detach(), stats.max_logit, stats.entropy)
    else:
        out = attention(q, k, v, case.layout, backend=backend, **options)
        gradients = torch.autograd.grad(out, leaves, tensors["grad_out"])
        others = (out[..., 0].detach(), zeros, zeros)
    grad_q, grad_k, grad_v, grad_sinks = *gradients, *([] if len(leaves) == 4 else [zeros])
    return Results(out.detach(), *others, grad_q, grad_k, grad_v, grad_sinks)


@dataclass
class Reach:
    """Which rows, keys and heads something may change, as masks."""

    rows: Tensor
    keys: Tensor
    heads: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, visible: Tensor, kv_heads: int) -> Reach:
        """These rows, and what sees them."""
        keys = (rows[..., None] & visible).any(2).unflatten(1, (kv_heads, -1)).any(2)
        return cls(rows, keys, rows.any(2).any(0))


def assert_same_elsewhere(ours: Results, expected: Results, reach: Reach) -> None:
    for names, reached in (
        (("out", "lse", "grad_q"), reach.rows),
        (("grad_k", "grad_v"), reach.keys),
        (("max_logit", "entropy", "grad_sinks"), reach.heads),
    ):
        for name in names:
            assert torch.equal(getattr(ours, name)[~reached], getattr(expected, name)[~reached]), name


def with_entry(tensors: dict[str, Tensor], place: str, index: tuple, entry: float) -> dict[str, Tensor]:
    changed = tensors[place].clone()
    changed[index] = entry
    return {**tensors, place: changed}


def cases(first: int, dtype: torch.dtype) -> list[Case]:
    """Random calls; every third without options, which SDPA may serve."""
    chosen = [random_case(seed, max_length=70).cast(dtype) for seed in range(first, first + 12)]
    for number, case in enumerate(chosen):
        if number % 3 == 0:
            case.options = {"causal": number % 2 == 0}
    return chosen


def random_entry(case: Case, place: str, seed: int) -> tuple[tuple[int, ...], Reach]:
    """An entry of one tensor, and what it may change."""
    rng = random.Random(seed)
    index = tuple(rng.randrange(size) for size in tensors_of(case)[place].shape)
    batch, head, position = index[:3]
    visible = visibility(case)
    rows = torch.zeros(case.q.shape[:3], dtype=torch.bool)
    if place in ("k", "v"):
        group = case.layout.group_size
        heads = slice(head * group, (head + 1) * group)
        rows[batch, heads] = visible[batch, heads, :, position]
    else:
        rows[batch, head, position] = visible[batch, head, position].any()
    return index, Reach.of_rows(rows, visible, case.layout.num_kv_heads)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("with_stats", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_no_bit_changes_that_does_not_see_it(
    backend: str, dtype: torch.dtype, with_stats: bool, place: str, value: float
):
    """In one entry of one tensor, compared with a finite number there."""
    for number, case in enumerate(cases(100 * PLACES.index(place), dtype)):
        tensors = tensors_of(case)
        index, reach = random_entry(case, place, number)
        ours = compute(case, with_entry(tensors, place, index, value), backend, with_stats)
        expected = compute(case, with_entry(tensors, place, index, 0.7), backend, with_stats)
        assert_same_elsewhere(ours, expected, reach)


@pytest.mark.parametrize("with_stats", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_padding_may_hold_anything(backend: str, dtype: torch.dtype, with_stats: bool):
    """Uninitialised memory in queries, keys, values and gradients of padding."""
    for seed in range(600, 612):
        case = random_case(seed, max_length=130).cast(dtype)
        batch, q_len, kv_len = case.k.shape[0], case.q.shape[2], case.k.shape[2]
        ids = torch.randint(-1, 2, (batch, kv_len), generator=torch.Generator().manual_seed(seed))
        case.options["segment_ids"] = ids
        padding = {"k": (ids < 0)[:, None, :, None], "grad_lse": (ids < 0)[:, None, -q_len:]}
        padding |= {"v": padding["k"], "q": padding["k"][:, :, -q_len:]}
        padding["grad_out"] = padding["q"]
        tensors = tensors_of(case)
        finite, *others = (
            compute(
                case, {name: x.masked_fill(padding[name], entry) for name, x in tensors.items()}, backend,
                with_stats,
            )
            for entry in (0.3, *NONFINITE)
        )  # fmt: skip
        for ours in others:
            for name, expected in vars(finite).items():
                assert torch.equal(getattr(ours, name), expected), name


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("option", ["sink_logits", "alibi_slopes"])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_options_of_a_head_stay_with_it(backend: str, dtype: torch.dtype, option: str, value: float):
    """In rows of that head which see something."""
    for case in cases(700, dtype):
        visible = visibility(case)
        rows = torch.zeros(case.q.shape[:3], dtype=torch.bool)
        rows[:, 0] = visible[:, 0].any(-1)
        results = []
        for entry in (value, 0.25):
            per_head = torch.linspace(0.1, 0.4, case.q.shape[1])
            per_head[0] = entry
            case.options[option] = per_head
            results.append(compute(case, tensors_of(case), backend))
        assert_same_elsewhere(results[0], results[1], Reach.of_rows(rows, visible, case.layout.num_kv_heads))


def attention_row_by_row(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse from the visible keys alone: gathered for each row, so that nothing else is touched."""
    visible = visibility(case)
    group, options, first = case.layout.group_size, case.options, k.shape[2] - q.shape[2]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, h, i in visible.any(-1).nonzero().tolist():
        seen = visible[b, h, i].nonzero().squeeze(1)
        z = options.get("scale", q.shape[3] ** -0.5) * (k[b, h // group, seen] * q[b, h, i]).sum(-1)
        if "softcap" in options:
            z = options["softcap"] * torch.tanh(z / options["softcap"])
        if "alibi_slopes" in options:
            z = z - options["alibi_slopes"][h].to(q.dtype) * (first + i - seen).abs()
        row_max = z.amax().detach()
        weights = torch.exp(z - row_max)
        place = tuple(torch.tensor([x]) for x in (b, h, i))
        out = out.index_put(place, ((weights / weights.sum())[:, None] * v[b, h // group, seen]).sum(0))
        lse = lse.index_put(place, row_max + weights.sum().log())
    return out, lse


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_nan_is_where_arithmetic_over_visible_pairs_puts_it(backend: str, dtype: torch.dtype, place: str):
    """Entry by entry, in results and gradients."""
    for number, case in enumerate(cases(800, dtype)):
        case.options.pop("sink_logits", None)
        index, reach = random_entry(case, place, number)
        tensors = with_entry(tensors_of(case), place, index, torch.nan)
        ours = compute(case, tensors, backend)
        leaves = [tensors[name].double().requires_grad_() for name in "qkv"]
        out, lse = attention_row_by_row(case, *leaves)
        seeds = [tensors["grad_out"].double(), tensors["grad_lse"]]
        gradients = [torch.zeros_like(x) for x in leaves]
        if out.requires_grad:
            gradients = torch.autograd.grad([out, lse], leaves, seeds)
        truth = {"out": out, "lse": lse}
        truth |= {f"grad_{name}": x for name, x in zip("qkv", gradients, strict=True)}
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        for name, true in truth.items():
            actual = getattr(ours, name).double()
            torch.testing.assert_close(actual, true, rtol=tolerance, atol=tolerance, equal_nan=True)
        for statistic in (ours.max_logit, ours.entropy):
            assert torch.equal(statistic.isnan(), reach.heads & (place in ("q", "k")))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_infinities_follow_arithmetic_over_visible_pairs(
    backend: str, dtype: torch.dtype, place: str, value: float
):
    for number, case in enumerate(cases(900, dtype)):
        case.options.pop("sink_logits", None)
        index, _ = random_entry(case, place, number)
        changed = with_entry(tensors_of(case), place, index, value)
        q, k, v = (changed[name] for name in "qkv")
        out, stats = attention(q, k, v, case.layout, backend=backend, return_stats=True, **case.options)
        expected, _ = attention_row_by_row(case, q.double(), k.double(), v.double())
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        keys = k.repeat_interleave(case.layout.group_size, 1)
        logits = case.options.get("scale", q.shape[3] ** -0.5) * (q @ keys.mT)
        largest = torch.where(visibility(case), logits, 0.0).abs().amax((0, 2, 3))
        torch.testing.assert_close(
            stats.max_logit, largest.to(stats.max_logit.dtype), rtol=1e-5, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_softcap_bounds_infinite_scores_too(backend: str):
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    k[0, 0, 2] = torch.inf
    assert attention(q.abs(), k, v, HeadLayout((None,)), softcap=3.0, backend=backend).isfinite().all()


@pytest.mark.parametrize(
    ("place", "value"),
    [*((place, value) for place in ("q", "k", "v", "grad_out") for value in NONFINITE), ("q", 3e38)],
)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_views_of_a_fused_projection(backend: str, place: str, value: float):
    """Long enough for several blocks of any kernel; with 3e38 a score overflows."""
    qkv = torch.randn(1, 530, 12, 8, generator=torch.Generator().manual_seed(1))
    qkv[:, 299, 4:8, 3] = 100.0
    q, k, v = qkv.transpose(1, 2).split(4, 1)
    layout = HeadLayout((None, None, 9, 9))
    case = Case(q, k, v, layout, {})
    visible = visibility(case)
    tensors = tensors_of(case)
    rows = visible[..., 300] if place in ("k", "v") else torch.arange(530).expand(1, 4, -1) == 300
    reach = Reach.of_rows(rows, visible, 4)
    results = []
    for entry in (value, 0.7):
        fused = qkv.clone()
        changed = {**tensors, **dict(zip("qkv", fused.transpose(1, 2).split(4, 1), strict=True))}
        changed["grad_out"] = tensors["grad_out"].clone()
        changed[place][:, :, 300, 3] = entry
        results.append(compute(case, changed, backend, with_stats=False))
    assert_same_elsewhere(results[0], results[1], reach)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_compiled_calls_hide_them_too(backend: str, value: float):
    """Forward and backward, without graph breaks."""
    layout = HeadLayout((4, None), sink_tokens=1)
    tensors = torch.randn(3, 1, 2, 30, 8).unbind()
    grad_out = torch.randn(1, 2, 30, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, backend=backend)

    def run(function, entry: float) -> list[Tensor]:
        q, k, v = (x.clone() for x in tensors)
        k[0, :, 20], v[0, :, 25, 0], q[0, 0, 22] = entry, entry, entry
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, finite = run(compiled, value), run(compiled, 0.5)
    for one, other in zip(ours, finite, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one[:, 0, 1:17], other[:, 0, 1:17])
    assert torch.equal(ours[0][:, :, :20], finite[0][:, :, :20])
    for one, eager in zip(ours, run(call, value), strict=True):
        assert torch.equal(one.isfinite(), eager.isfinite())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("round_probabilities", [False, True])
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_half_precision_and_rounded_probabilities(
    backend: str, round_probabilities: bool, dtype: torch.dtype
):
    for number, case in enumerate(cases(1000, dtype)):
        case.options["round_probabilities"] = round_probabilities
        for place in PLACES:
            index, reach = random_entry(case, place, number)
            expected = compute(case, with_entry(tensors_of(case), place, index, 0.5), backend)
            for value in NONFINITE:
                ours = compute(case, with_entry(tensors_of(case), place, index, value), backend)
                assert_same_elsewhere(ours, expected, reach)
