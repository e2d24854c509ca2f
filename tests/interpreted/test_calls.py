"""Interpreted Triton kernels against the truth in float64, over random calls with all options together."""

import pytest
import torch
from tests.attention_cases import Case, assert_as_good_as_plain, computed, random_case, visibility

from longshort import HeadLayout, attention
from longshort.backends.triton import launching, operator


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 24))]
)
def test_random_calls(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=40), torch.float32, "triton")


@pytest.mark.parametrize("seed", [31, 33])
def test_half_precision(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=40), torch.float16, "triton")


@pytest.mark.parametrize("seed", [41, 42])
def test_large_logits(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=40, logit_scale=100.0), torch.float32, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_more_random_calls(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=70), torch.float32, "triton")


@pytest.mark.parametrize("seed", [2, 6])
def test_the_same_bits_again_and_without_statistics(seed: int):
    case = random_case(seed, max_length=40).cast(torch.float32)
    first, second = (computed(case, "triton") for _ in range(2))
    for name in ("out", "lse", "max_logit", "entropy"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(map(torch.equal, first.gradients, second.gradients))
    alone = attention(case.q, case.k, case.v, case.layout, backend="triton", **case.options)
    assert torch.equal(alone, first.out)


@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_see_their_keys_and_no_others(causal: bool, sink_tokens: int):
    """Without queries a row is the mean of the values that it sees, here of a column for each key."""
    windows, length = (1, 2, 15, 16, 17, 33, None), 35
    layout = HeadLayout(windows, sink_tokens=sink_tokens)
    q, k = torch.zeros(2, 1, len(windows), length, length).unbind()
    out = attention(q, k, torch.eye(length).expand_as(k), layout, causal=causal, backend="triton")
    case = Case(q, k, k, layout, {"causal": causal})
    torch.testing.assert_close(out > 0, visibility(case))


def test_vectors_that_lie_far_apart():
    """Entries of a vector are addressed by 32 bits; tensors that need more are copied."""
    far = torch.empty_strided((1, 1, 1, 3), (1, 1, 1, 1 << 30), device="meta")
    near = torch.empty(1, 1, 1, 3)
    copied, kept = launching.with_near_channels(far, near)
    assert copied.stride(3) == 1
    assert kept is near


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compilers_see_one_operator():
    case = random_case(5, max_length=17).cast(torch.float32)

    def loss(q, k, v):
        out, stats = attention(q, k, v, case.layout, backend="triton", return_stats=True, **case.options)
        return out.square().sum() + stats.lse.clamp(min=-10).sum()

    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_is_registered_well():
    assert operator  # its import registers it
    q, k, v = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (2, 1, 1))
    options = (None, torch.tensor([[0, 0, 0, 1, -1]]), [3, 3], 1, True, 0.5, 4.0, torch.float32, True)
    torch.library.opcheck(torch.ops.longshort.triton_attention, (q, k, v, *options))
