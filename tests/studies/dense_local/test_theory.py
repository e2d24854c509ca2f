import math

import pytest
import torch

from longshort.studies.dense_local.task import Fit, Loss, make_target, run_fit, visible_pairs
from longshort.studies.dense_local.theory import (
    least_loss_within,
    loss_bound,
    max_logit_bound,
    numerical_rank,
)

FIT = Fit(length=12, head_dim=4, span=3, window=None, learning_rate=0.1, steps=100, seed=0)
TARGET = make_target(FIT, torch.Generator().manual_seed(0))


def loss_of(scores):
    return Loss(TARGET, visible_pairs(12, None), 0.0, torch.float64)(scores)


def test_rank():
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.05, 0.0]))
    assert [numerical_rank(matrix, tolerance) for tolerance in (0.6, 0.1, 0.01, 0.0)] == [1, 2, 3, 3]


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, 4.0])
def test_the_bound_is_the_mass_outside_the_band(limit):
    """Logits of +M inside the band and −M outside leave the least outside: counted pair by pair."""
    total = 0.0
    for i in range(12):
        inside, outside = min(i + 1, 3), max(0, i + 1 - 3)
        band = inside * math.exp(limit) / (inside * math.exp(limit) + outside * math.exp(-limit))
        total -= math.log(band)
    assert loss_bound(12, 3, limit) == pytest.approx(total / 12)


@pytest.mark.parametrize("limit", [0.5, 1.5, 3.0])
def test_no_logits_within_a_limit_do_better(limit):
    """Against random logits, and against gradient descent on all n² of them, clamped."""
    least = least_loss_within(TARGET, limit)
    assert loss_bound(12, 3, limit) < least
    for _ in range(50):
        assert loss_of(limit * (2 * torch.rand(12, 12, dtype=torch.float64) - 1)) > least
    free = torch.zeros(12, 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        loss_of(free.clamp(-limit, limit) + 0.0 * free).backward()
        optimizer.step()
        with torch.no_grad():
            free.clamp_(-limit, limit)
    found = loss_of(free).item()
    assert found >= least - 1e-9
    assert found == pytest.approx(least, rel=1e-2)


def test_fits_of_any_rank_lie_above_the_bounds():
    for head_dim in (2, 12):
        result = run_fit(Fit(12, head_dim, 3, None, 0.1, 300, 0), "cpu")
        for loss, logit in zip(result["losses"], result["max_logits"], strict=True):
            rounding = 1 + 1e-4
            assert loss * rounding >= least_loss_within(TARGET, logit) - 1e-12
            assert least_loss_within(TARGET, logit) >= loss_bound(12, 3, logit) - 1e-12
            assert max_logit_bound(12, 3, loss) <= logit * rounding


def test_the_two_bounds_are_inverse():
    for limit in (0.3, 2.0, 9.0):
        assert max_logit_bound(64, 8, loss_bound(64, 8, limit)) == pytest.approx(limit, rel=1e-6)
    assert max_logit_bound(64, 8, 100.0) == 0.0
    assert max_logit_bound(64, 8, 0.0) == math.inf
    assert max_logit_bound(8, 8, 0.0) == 0.0  # there is nothing outside the band


def test_needed_logits_grow_with_length_as_half_a_logarithm():
    needed = [max_logit_bound(n, 16, 1e-4) for n in (4096, 8192)]
    assert needed[1] - needed[0] == pytest.approx(math.log(2) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_bound(4, 5, 1.0), r"span must be at most length \(4\), got 5"),
        (lambda: loss_bound(4, 2, -1.0), "max_logit must be a number >= 0"),
        (lambda: max_logit_bound(0, 2, 1.0), "length must be an integer >= 1"),
        (lambda: max_logit_bound(4, 2, math.nan), "loss must be a number >= 0"),
        (lambda: least_loss_within(TARGET, math.inf), "max_logit must be a finite number >= 0"),
        (lambda: numerical_rank(TARGET, 2.0), "tolerance must be within 0 ... 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
