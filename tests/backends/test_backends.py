"""Every backend against the definition, over random calls with all options together."""

from typing import Any

import pytest
import torch
from tests.attention_cases import (
    RUNNABLE,
    Case,
    assert_as_good_as_plain,
    computed,
    plain,
    random_case,
    visibility,
)

from longshort import HeadLayout, attention

HALVES = [torch.bfloat16, torch.float16]
# those that compute everything; cpu refuses float64, float16 and round_probabilities
COMPLETE = ["blockwise", "reference"]
HALVES_OF_BACKENDS = [("cpu", torch.bfloat16), *((name, dtype) for name in COMPLETE for dtype in HALVES)]


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("block", range(10))
def test_random_calls_in_float64(backend: str, block: int):
    for seed in range(20 * block, 20 * block + 20):
        assert_as_good_as_plain(random_case(seed, max_length=70), torch.float64, backend)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("block", range(5))
def test_random_calls_in_float32(backend: str, block: int):
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        assert_as_good_as_plain(random_case(seed), torch.float32, backend)


@pytest.mark.parametrize(("backend", "dtype"), HALVES_OF_BACKENDS)
def test_random_calls_in_half_precision(backend: str, dtype: torch.dtype):
    for seed in range(2000, 2020):
        assert_as_good_as_plain(random_case(seed, max_length=70), dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", RUNNABLE)
def test_many_long_random_calls(backend: str):
    for seed in range(3000, 3150):
        assert_as_good_as_plain(random_case(seed, max_length=300), torch.float32, backend)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_logits_of_thousands(backend: str):
    for seed in range(4000, 4020):
        case = random_case(seed, max_length=70, logit_scale=2000.0)
        assert_as_good_as_plain(case, torch.float32, backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((name, torch.float32) for name in RUNNABLE),
        *((name, torch.float64) for name in COMPLETE),
        *HALVES_OF_BACKENDS,
    ],
)
def test_equal_and_single_keys_are_exact(backend: str, dtype: torch.dtype):
    q = torch.randn(1, 2, 9, 4).to(dtype)
    k, v = torch.zeros_like(q), torch.randn(1, 2, 9, 4).to(dtype)
    out, stats = attention(q, k, v, HeadLayout((1, 4)), backend=backend, return_stats=True)
    assert torch.equal(out[:, 0], v[:, 0])
    expected = torch.tensor([min(i + 1, 4) for i in range(9)], dtype=stats.lse.dtype)
    torch.testing.assert_close(stats.lse[0, 1], expected.log())
    torch.testing.assert_close(stats.entropy, torch.stack([0 * expected.sum(), expected.log().mean()]))
    assert stats.max_logit.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales_of_any_sign(backend: str, scale: float):
    """Without any other option, the call that SDPA would serve."""
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64).unbind()
    for windows in ((None, None), (5, None)):
        case = Case(q, k, v, HeadLayout(windows), {"scale": scale})
        assert_as_good_as_plain(case, torch.float32, backend)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("sink", [-12.0, -4.0, 0.0, 12.0])
def test_sink_gradients_do_not_cancel(backend: str, sink: float):
    q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
    case = Case(q, k, v, HeadLayout((64, None)), {"sink_logits": torch.full((2,), sink)})
    visible = visibility(case)
    truth = plain(case.cast(torch.float64), visible).gradients[3]
    ours = (computed(case, backend).gradients[3] - truth).abs() / truth.abs()
    theirs = (plain(case, visible).gradients[3] - truth).abs() / truth.abs()
    assert (ours <= 2 * theirs + 1e-5).all()


@pytest.mark.parametrize("backend", COMPLETE)
def test_gradcheck(backend: str):
    options = {
        "softcap": 3.0, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "segment_ids": torch.tensor([[0, 0, 1, 0, 1, 1, -1]]),
    }  # fmt: skip
    layout = HeadLayout((2, 2, None, None), num_kv_heads=2, sink_tokens=1)
    q = torch.randn(1, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sinks):
        out, stats = attention(
            q, k, v, layout, sink_logits=sinks, backend=backend, return_stats=True, **options
        )
        return out, stats.lse.clamp(min=-1e3)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_gradients_of_gradients_are_right_or_an_error(backend: str):
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    out = attention(
        q, k, v, HeadLayout((3, None)), segment_ids=torch.zeros(1, 9, dtype=torch.int64), backend=backend
    )
    gradient = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    if backend == "reference":
        assert torch.autograd.grad(gradient.sum(), k)[0].any()
        return
    with pytest.raises(NotImplementedError, match="no gradients of gradients; backend='reference' has"):
        torch.autograd.grad(gradient.sum(), k)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("seed", range(40))
def test_statistics_change_no_bit(backend: str, seed: int):
    case = random_case(seed, max_length=130).cast(torch.float32)

    def run(return_stats: bool) -> list[torch.Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
        if return_stats:
            out, _ = attention(q, k, v, case.layout, backend=backend, return_stats=True, **case.options)
        else:
            out = attention(q, k, v, case.layout, backend=backend, **case.options)
        return [out, *torch.autograd.grad((out * torch.cos(out)).sum(), (q, k, v))]

    for with_stats, without in zip(run(True), run(False), strict=True):
        assert torch.equal(with_stats, without)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 5), (2, 0, 0), (0, 0, 0)])
def test_empty_calls(backend: str, batch: int, q_len: int, kv_len: int):
    q = torch.randn(batch, 2, q_len, 4, requires_grad=True)
    k, v = (torch.randn(batch, 2, kv_len, 4, requires_grad=True) for _ in range(2))
    sinks = torch.randn(2, requires_grad=True)
    out, stats = attention(
        q, k, v, HeadLayout((3, None)), sink_logits=sinks, backend=backend, return_stats=True
    )
    assert out.shape == q.shape
    assert stats.lse.shape == q.shape[:3]
    assert stats.max_logit.tolist() == stats.entropy.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_nothing_visible_gives_zeros(backend: str):
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    ids = torch.full((1, 6), -1)
    out, stats = attention(q, k, v, HeadLayout((3, None), sink_tokens=2), segment_ids=ids, backend=backend,
                           return_stats=True)  # fmt: skip
    assert not out.any()
    assert (stats.lse == -torch.inf).all()
    assert stats.max_logit.tolist() == stats.entropy.tolist() == [0.0, 0.0]
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_gradients_of_lse_stop_at_rows_that_see_nothing(backend: str):
    """A loss on lse may be infinite there, and its gradient NaN."""
    q, k, v = (torch.randn(1, 2, 30, 4, requires_grad=True) for _ in range(3))
    ids = torch.zeros(1, 30, dtype=torch.int64)
    ids[:, :10] = -1
    _, stats = attention(q, k, v, HeadLayout((3, None)), segment_ids=ids, backend=backend, return_stats=True)
    loss = torch.where(stats.lse > -torch.inf, stats.lse.square(), 0.0).sum()
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (q, k), allow_unused=True))


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1])
def test_nan_of_any_bits(backend: str, bits: int):
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    k[0, :, 20, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for queries in (q, q[:, :, -1:]):
        out = attention(queries, k, v, HeadLayout((None, None)), backend=backend)
        assert out[0, :, -1].isnan().all()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_reach_what_is_visible_and_nothing_else(backend: str, causal: bool):
    layout = HeadLayout((1, 5, 5, None), sink_tokens=2)
    q, k, v = (torch.randn(1, 4, 40, 8, requires_grad=True) for _ in range(3))
    visible = visibility(Case(q, k, v, layout, {"causal": causal}))
    for row in (0, 7, 23, 39):
        out = attention(q, k, v, layout, causal=causal, backend=backend)
        grad_k, grad_v = torch.autograd.grad(out[:, :, row].square().sum(), (k, v))
        assert torch.equal(grad_v.abs().sum(-1) > 0, visible[:, :, row])
        assert not grad_k[~visible[:, :, row]].any()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_shows_in_every_row_that_sees_it(backend: str, place: str):
    layout = HeadLayout((4, None))
    tensors: dict[str, Any] = {name: torch.randn(1, 2, 30, 8) for name in "qkv"}
    tensors[place][0, :, 20, 3] = torch.nan
    out, stats = attention(**tensors, layout=layout, backend=backend, return_stats=True)
    rows = range(20, 21) if place == "q" else range(20, 24)
    assert out[0, 0, list(rows)].isnan().any(-1).all()
    assert out[0, 1, list(rows)].isnan().any(-1).all()
    assert stats.max_logit.isnan().all() == (place != "v")


@pytest.mark.parametrize("backend", RUNNABLE)
def test_infinities_do_not_hang_or_crash(backend: str):
    for place in "qkv":
        for value in (torch.inf, -torch.inf):
            tensors: dict[str, Any] = {name: torch.randn(1, 2, 30, 8) for name in "qkv"}
            tensors[place][0, :, 20] = value
            out, stats = attention(
                **tensors, layout=HeadLayout((4, None)), backend=backend, return_stats=True
            )
            if place == "v":
                assert not out[0, :, 20:24].isfinite().any(-1).any()
                assert stats.max_logit.isfinite().all()
            else:
                assert out[0, :, :20].isfinite().all()
                assert not stats.max_logit.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rounded_probabilities_agree(dtype: torch.dtype):
    """The two backends that round do so in the same places; in fp32 there is nothing to round."""
    for seed in range(30):
        case = random_case(seed, max_length=130).cast(dtype)
        case.options["round_probabilities"] = True
        reference, blockwise = computed(case, "reference"), computed(case, "blockwise")
        del case.options["round_probabilities"]
        exact = computed(case, "reference")
        # a value on the edge between two roundings may fall on either side
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        pairs = [(reference.out, blockwise.out, exact.out)]
        pairs += list(zip(reference.gradients, blockwise.gradients, exact.gradients, strict=True))
        for one, other, unrounded in pairs:
            scale = max(1.0, unrounded.abs().max().item())
            torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=tolerance)
            torch.testing.assert_close(one, unrounded, atol=3 * tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("backend", COMPLETE)
def test_rounding_happens(backend: str):
    """exp(z - max) = (1, e^-1) in bf16 meets v; the denominator stays exact. Likewise P and dS."""
    q = torch.tensor([1.0, 1.0]).view(1, 1, 2, 1).bfloat16().requires_grad_()
    k = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).bfloat16()
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).bfloat16().requires_grad_()
    out = attention(q, k, v, HeadLayout((None,)), round_probabilities=True, backend=backend)
    small = torch.tensor(-1.0).exp()
    denominator = 1 + small
    assert out[0, 0, 1, 0] == (small.bfloat16().float() / denominator).bfloat16()
    grad_q, grad_v = torch.autograd.grad(out[0, 0, 1, 0], (q, v))
    p = small / denominator
    assert grad_v[0, 0, 1, 0] == (1 / denominator).bfloat16()
    row_dot = out.detach().float()[0, 0, 1, 0]
    assert grad_q[0, 0, 1, 0] == ((1 - p) * (0 - row_dot)).bfloat16()
    assert grad_v[0, 0, 0, 0] == p.bfloat16()
