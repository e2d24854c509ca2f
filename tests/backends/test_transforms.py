"""Transforms of torch.func and forward-mode differentiation: the right numbers, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention_cases import RUNNABLE, Case, random_case
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from longshort import HeadLayout, attention, explain

LAYOUT = HeadLayout((3, 3, None, None), num_kv_heads=2, sink_tokens=1)
NO_TANGENTS = "forward-mode differentiation is on, and this backend computes no tangents; 'reference' does"
OPTIONS = [{}, {"causal": False, "softcap": 3.0, "segment_ids": torch.tensor([[0, 0, 1, 0, 1, 1, -1]])}]


def jvp(function, primals: Any, tangents: Any) -> Any:
    """The tangents of the outputs."""
    return torch.func.jvp(function, primals, tangents)[1]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(2, 1, 2, 7, 3, dtype=dtype).unbind()
    return torch.randn(1, 4, 7, 3, dtype=dtype), k, v


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "cpu" else torch.float64


def run(backend: str, **options):
    """out and the finite lse of all tensors."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = attention(q, k, v, LAYOUT, backend=backend, return_stats=True, **options)
        return out, stats.lse.clamp(min=-1e3)

    return function


def total(backend: str, **options):
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, LAYOUT, backend=backend, **options).sin().sum()

    return function


def outputs_of(case: Case, backend: str):
    options = {name: x for name, x in case.options.items() if name != "sink_logits"}

    def function(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        with_sinks = {**options, "sink_logits": sinks[0]} if sinks else options
        out, stats = attention(q, k, v, case.layout, backend=backend, return_stats=True, **with_sinks)
        return out, torch.where(stats.lse == -torch.inf, 0.0, stats.lse)

    return function


@pytest.mark.parametrize("by_func", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tangents_agree_with_gradients(backend: str, by_func: bool):
    """<w, J t> = <Jᵀ w, t>, over random calls with all options together."""
    for seed in range(40):
        case = random_case(seed, max_length=40)
        function = outputs_of(case, backend)
        primals = [case.q, case.k, case.v]
        if "sink_logits" in case.options:
            primals.append(case.options["sink_logits"])
        tangents = [torch.randn_like(x) for x in primals]
        if by_func:
            ours: Any = jvp(function, tuple(primals), tuple(tangents))
        else:
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
                ours = [forward_ad.unpack_dual(x).tangent for x in function(*duals)]
        leaves = [x.detach().clone().requires_grad_() for x in primals]
        outputs = outputs_of(case, "reference")(*leaves)
        weights = [torch.randn_like(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, leaves, weights)
        forward = sum(((t * w).sum() for t, w in zip(ours, weights, strict=True)), torch.zeros(()))
        reverse = sum(((t * g).sum() for t, g in zip(tangents, gradients, strict=True)), torch.zeros(()))
        torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "blockwise"])
def test_backends_without_tangents_refuse(backend: str, options: dict):
    primals = inputs(dtype_of(backend))
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot serve this call: {NO_TANGENTS}"):
        jvp(run(backend, **options), primals, primals)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primals[0], primals[0])
        with pytest.raises(ValueError, match=NO_TANGENTS):
            attention(dual, *primals[1:], LAYOUT, backend=backend, **options)
        explanation = explain(dual, *primals[1:], LAYOUT, **options)
        assert explanation.backend == "reference"
        assert explanation.reasons["blockwise"] == NO_TANGENTS
    assert explain(*primals, LAYOUT, **options).backend == backend


def operator_calls() -> dict[str, tuple]:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    rows, heads = torch.randn(1, 2, 5), (None, None)
    return {
        "tiled_attention": (q, k, v, *heads, 3, 0, True, 0.5, None, False, torch.float32, False),
        "tiled_attention_backward": (q, k, v, *heads, None, rows, rows, q, None, 3, 0, True, 0.5, None),
        "sdpa": (q, k, v, True, 0.5),
        "sdpa_backward": (q, k, v, q, rows, q.new_empty(0), q.new_empty(0), q, True, 0.5),
        "cpu_attention": (q, k, v, *heads, [3, 3], 0, True, 0.5, None, torch.float32, False, True),
        "cpu_attention_backward": (q, k, v, *heads, q, rows, rows, q, None, [3, 3], 0, True, 0.5, None),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_operators_refuse_tangents_themselves(name: str):
    operator, arguments = getattr(torch.ops.longshort, name), operator_calls()[name]
    operator(*arguments)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_TANGENTS):
        operator(forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
    with pytest.raises(NotImplementedError, match=NO_TANGENTS):
        jvp(lambda q: operator(q, *arguments[1:]), arguments[:1], arguments[:1])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_tangents_of_a_backward_pass(backend: str, options: dict):
    """The forward pass comes before forward mode is on, so that any backend may have served it."""
    primals = inputs(dtype_of(backend))
    out, pull_back, *_ = torch.func.vjp(total(backend, **options), *primals)
    weight = torch.ones_like(out)
    if backend == "reference":
        torch.testing.assert_close(jvp(pull_back, (weight,), (weight,)), pull_back(weight))
        return
    with pytest.raises(NotImplementedError, match=NO_TANGENTS):
        jvp(pull_back, (weight,), (weight,))


@pytest.mark.parametrize("options", [*OPTIONS, {"round_probabilities": True}])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_vmap_is_a_loop(backend: str, options: dict):
    if backend == "cpu" and "round_probabilities" in options:
        return
    stacked = [torch.stack([x, 2 * x, x - 1], 1) for x in inputs(dtype_of(backend))]
    function, loss = run(backend, **options), total(backend, **options)
    gradients = grad(loss, argnums=(0, 1, 2))
    ours = vmap(function, in_dims=1)(*stacked)
    our_gradients = vmap(gradients, in_dims=1)(*stacked)

    def of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(loss, in_dims=1)(q, k, v).sum()

    of_sum = grad(of_all, argnums=(0, 1, 2))(*stacked)
    for i in range(3):
        q, k, v = (x[:, i] for x in stacked)
        torch.testing.assert_close([x[i] for x in ours], list(function(q, k, v)))
        leaves: Any = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        expected = list(torch.autograd.grad(loss(leaves[0], leaves[1], leaves[2]), leaves))
        torch.testing.assert_close([x[i] for x in our_gradients], expected)
        torch.testing.assert_close([x[:, i] for x in of_sum], expected)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_vmap_over_segments_keys_and_slopes_alone(backend: str):
    q, k, v = inputs(dtype_of(backend))
    ids, slopes = torch.randint(-1, 2, (3, 1, 7)), torch.rand(3, 4)

    def function(ids: Tensor, slopes: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, LAYOUT, segment_ids=ids, alibi_slopes=slopes, backend=backend)

    ours = vmap(function)(ids, slopes, torch.stack([v, v, -v]))
    for i, values in enumerate((v, v, -v)):
        torch.testing.assert_close(ours[i], function(ids[i], slopes[i], values))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_jacobians(backend: str, options: dict):
    q, k, v = inputs(dtype_of(backend))

    def of(backend: str):
        return lambda q: attention(q, k, v, LAYOUT, backend=backend, **options)

    expected = jacrev(of("reference"))(q)
    torch.testing.assert_close(jacrev(of(backend))(q), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(jacfwd(of("auto"))(q), expected)
    vectorized = torch.autograd.functional.jacobian(of(backend), q, vectorize=True)
    torch.testing.assert_close(vectorized, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_second_derivatives(options: dict):
    primals = inputs()
    loss, reference = total("auto", **options), total("reference", **options)
    expected = jacrev(jacrev(reference, argnums=1))(*primals)
    torch.testing.assert_close(jacrev(jacfwd(loss, argnums=1))(*primals), expected)
    expected = jacrev(jacrev(reference))(*primals)
    torch.testing.assert_close(hessian(loss)(*primals), expected)
    zeros = [torch.zeros_like(x) for x in primals[1:]]
    products = jvp(grad(loss), primals, (primals[0], *zeros))
    torch.testing.assert_close(products, torch.tensordot(expected, primals[0], 4))
    leaves = [x.requires_grad_() for x in primals]
    assert torch.autograd.gradgradcheck(lambda *x: reference(*x), leaves)


@pytest.mark.parametrize("backend", ["cpu", "blockwise"])
def test_second_derivatives_in_reverse_mode_are_refused(backend: str):
    with pytest.raises(NotImplementedError, match="no gradients of gradients; backend='reference' has"):
        grad(lambda q, k, v: grad(total(backend))(q, k, v).sum())(*inputs(dtype_of(backend)))


def test_tangents_of_tangents_are_refused():
    with pytest.raises(NotImplementedError, match=r"forward over reverse mode works: .*hessian"):
        jacfwd(jacfwd(total("auto")))(*inputs())


def test_rounded_probabilities_have_no_tangents():
    primals = inputs()
    with pytest.raises(
        ValueError, match=r"no backend can serve this call; cpu: .* round_probabilities is not"
    ):
        jvp(total("auto", round_probabilities=True), primals, primals)
    rounded = jacrev(jacrev(total("reference", round_probabilities=True)))(*primals)  # of float64: exact
    torch.testing.assert_close(rounded, jacrev(jacrev(total("reference")))(*primals))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_nan_stays_out_of_tangents_and_second_derivatives(value: float):
    """In another segment, in primals and tangents."""
    primals, tangents = inputs(), inputs()
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    loss = total("auto", segment_ids=ids)

    def derivatives(entry: float) -> list[Tensor]:
        changed = [x.clone() for x in (*primals, *tangents)]
        for x in changed:
            x[:, :, 5] = entry
        point, direction = tuple(changed[:3]), tuple(changed[3:])
        first = jvp(run("auto", segment_ids=ids), point, direction)
        second = jvp(grad(loss, argnums=(0, 1, 2)), point, direction)
        return [x[:, :, :5] for x in (*first, *second)]

    for ours, expected in zip(derivatives(value), derivatives(0.5), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)


def test_compiled_transforms():
    q, k, v = inputs(torch.float32)

    def loss(q: Tensor) -> Tensor:
        return attention(q, k, v, LAYOUT).square().sum()

    def tangent(q: Tensor) -> Tensor:
        return jvp(loss, (q,), (q,))

    expected = tangent(q)
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(q), expected)
    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(2):  # a compiled call without tangents does not serve one with them
        torch.testing.assert_close(compiled(q), loss(q))
        torch.testing.assert_close(jvp(compiled, (q,), (q,)), expected)
