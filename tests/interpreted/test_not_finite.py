"""NaN and inf reach the rows that see them, and change no bit of anything else: in the Triton kernels."""

import pytest
import torch
from tests.attention_cases import Case, random_case
from tests.backends.test_nonfinite import (
    assert_same_elsewhere,
    compute,
    random_entry,
    tensors_of,
    with_entry,
)

PLACES = ["q", "k", "v", "grad_out", "grad_lse"]
# small calls, with hidden pairs in their tiles
SEEDS = [seed for seed in range(200) if 16 < random_case(seed, max_length=40).q.shape[2] <= 20]


def small_case(number: int) -> Case:
    case = random_case(SEEDS[number], max_length=40).cast(torch.float32)
    if case.q.shape[0] == 1:
        return case
    options = {key: x[:1] if key == "segment_ids" else x for key, x in case.options.items()}
    return Case(case.q[:1], case.k[:1], case.v[:1], case.layout, options)


@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "place",
    [
        place if place in ("k", "grad_out") else pytest.param(place, marks=pytest.mark.slow)
        for place in PLACES
    ],
)
def test_no_bit_changes_that_does_not_see_it(place: str, value: float):
    case = small_case(PLACES.index(place))
    tensors = tensors_of(case)
    index, reach = random_entry(case, place, 1)
    ours = compute(case, with_entry(tensors, place, index, value), "triton")
    expected = compute(case, with_entry(tensors, place, index, 0.7), "triton")
    assert_same_elsewhere(ours, expected, reach)
    if place in ("q", "k", "v"):
        assert not ours.out[reach.rows].isfinite().all() or not reach.rows.any()


@pytest.mark.parametrize("place", ["k", "v", "q"])
def test_it_is_where_the_reference_has_it(place: str):
    case = small_case(5)
    index, _ = random_entry(case, place, 2)
    tensors = with_entry(tensors_of(case), place, index, torch.nan)
    ours, expected = (compute(case, tensors, backend) for backend in ("triton", "reference"))
    for name, true in vars(expected).items():
        torch.testing.assert_close(getattr(ours, name), true, rtol=1e-4, atol=1e-4, equal_nan=True)
