"""`LongShortAttention`: QK-norm and softcap bound what they say they bound."""

import math

import pytest
import torch
from tests.layer_cases import make_input, make_layer
from torch import Tensor

from longshort.layers import LongShortAttention, Observation, Rotary


def observe(layer: LongShortAttention, x: Tensor) -> Observation:
    """What attention got."""
    seen: list[Observation] = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    return seen[0]


def scale_projection(layer: LongShortAttention, factor: float) -> None:
    with torch.no_grad():
        layer.qkv_proj.weight.mul_(factor)


@pytest.mark.parametrize("rotary", [None, Rotary()], ids=["plain", "rotary"])
def test_qk_norm_undoes_a_scaling_of_the_projection(rotary: Rotary | None) -> None:
    layer, x = make_layer(qk_norm=True, rotary=rotary), make_input()
    scale_projection(layer, 100)  # far above the epsilon of the norm
    before = observe(layer, x)
    scale_projection(layer, 100)
    after = observe(layer, x)
    torch.testing.assert_close(after.q, before.q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.k, before.k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.stats.max_logit, before.stats.max_logit, rtol=1e-4, atol=1e-4)
    assert (after.stats.max_logit > 0).all()


@pytest.mark.parametrize("rotary", [None, Rotary()], ids=["plain", "rotary"])
def test_qk_norm_bounds_the_logits_by_its_gains(rotary: Rotary | None) -> None:
    layer = make_layer(qk_norm=True, rotary=rotary)
    assert layer.q_norm is not None and layer.k_norm is not None
    with torch.no_grad():
        layer.k_norm.weight.mul_(-3)
        query_rows, key_rows = layer.qkv_proj.weight.unflatten(0, (-1, 8)).split([6, 6])
        key_rows[:3] = query_rows[::2]  # keys like queries: logits near the bound
    scale_projection(layer, 1e4)
    q_gain, k_gain = layer.q_norm.weight.detach(), layer.k_norm.weight.detach()
    bound = math.sqrt(8) * (q_gain.abs().amax() * k_gain.abs().amax()).item()
    if rotary is None:
        bound = math.sqrt(8) * (q_gain * k_gain).abs().amax().item()
    max_logit = observe(layer, make_input(batch=8)).stats.max_logit
    assert (max_logit <= bound * (1 + 1e-5)).all()
    assert max_logit.amax() > bound / 2


@pytest.mark.parametrize("rotary", [None, Rotary()], ids=["plain", "rotary"])
def test_without_qk_norm_nothing_bounds_them(rotary: Rotary | None) -> None:
    layer, x = make_layer(rotary=rotary), make_input()
    before = observe(layer, x).stats.max_logit
    scale_projection(layer, 100)
    torch.testing.assert_close(observe(layer, x).stats.max_logit, 1e4 * before, rtol=1e-4, atol=0)


def test_a_softcap_bounds_how_far_a_row_is_from_uniform() -> None:
    layer = make_layer(softcap=0.5)
    scale_projection(layer, 1e4)
    observation = observe(layer, make_input())
    # All scores within ±0.5: no probability of a row of n is above e / (n - 1 + e), however large the logits.
    assert (observation.stats.max_logit > 1e4).all()
    lse = observation.stats.lse
    assert (lse <= 0.5 + math.log(11)).all() and (lse >= -0.5).all()
