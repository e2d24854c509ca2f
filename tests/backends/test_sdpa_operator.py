"""The operator around PyTorch's kernels for SDPA."""

import pytest
import torch
from torch.nn import functional as F

from longshort.backends.sdpa_operator import sdpa


def inputs(length: int = 9, requires_grad: bool = True) -> list[torch.Tensor]:
    fused = torch.randn(2, length, 6, 8)
    return [x.detach().requires_grad_(requires_grad) for x in fused.transpose(1, 2).split(2, 1)]


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal: bool):
    torch.library.opcheck(torch.ops.longshort.sdpa.default, (*inputs(), causal, 0.3))
    q, k, v = inputs(requires_grad=False)
    outputs = torch.ops.longshort.sdpa(q, k, v, causal, 0.3)
    arguments = (q, k, v, *outputs, torch.randn_like(q), causal, 0.3)
    torch.library.opcheck(torch.ops.longshort.sdpa_backward.default, arguments)


@pytest.mark.parametrize("length", [1, 9, 600])
@pytest.mark.parametrize("causal", [True, False])
def test_bits_and_strides_are_those_of_sdpa(causal: bool, length: int):
    q, k, v = inputs(length)
    ours = sdpa(q, k, v, causal, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    assert torch.equal(ours, expected)
    assert ours.stride() == expected.stride()
    weight = torch.randn_like(ours)
    gradients = (torch.autograd.grad(out, (q, k, v), weight) for out in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("place", ["q", "k"])
def test_nan_is_not_taken_for_hidden(place: str, length: int):
    """The CPU's kernel takes a row whose scores are all NaN for one that sees nothing, if it is short."""
    q, k, v = torch.randn(3, 1, 1, length, 8).unbind()
    (q if place == "q" else k)[:, :, 0, 3] = torch.nan
    assert sdpa(q, k, v, True, 0.3)[0, 0, 0].isnan().all()
