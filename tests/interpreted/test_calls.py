"""Interpreted Triton kernels against the truth in float64, over random calls with all options together."""

import pytest
import torch
from tests.attention_cases import assert_as_good_as_plain, computed, random_case

from longshort import attention


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=40), torch.float32, "triton")


@pytest.mark.parametrize("seed", range(30, 34))
def test_half_precision(seed: int):
    assert_as_good_as_plain(random_case(seed, max_length=40), torch.float16, "triton")


@pytest.mark.parametrize("seed", range(40, 43))
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
