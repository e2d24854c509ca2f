from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from longshort.projection import project


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (1, 16, 24), (4, 0, 24), (1, 40, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_a_linear_layer(threads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 36, bias=False, dtype=dtype)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    out = project(layer, x)
    torch.testing.assert_close(out, F.linear(x, layer.weight))
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (x, layer.weight))
    expected = torch.autograd.grad((F.linear(x, layer.weight) * weights).sum(), (x, layer.weight))
    torch.testing.assert_close(got, expected)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each split product had."""
    found: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: found.append(len(a)) or bmm(a, b))
    return found


def test_few_tokens_are_split_over_threads(threads: int, parts: list[int]) -> None:
    layer = nn.Linear(24, 36, bias=False)
    project(layer, torch.randn(1, 1, 24))
    assert parts == ([] if threads == 1 else [threads])
    project(layer, torch.randn(1, 17, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert project(layer, torch.randn(1, 1, 24)).dtype == torch.bfloat16
    assert len(parts) == (threads > 1)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def biased(layer: nn.Linear) -> nn.Module:
    layer.bias = nn.Parameter(torch.ones(36))
    return layer


def hooked(layer: nn.Linear) -> nn.Module:
    def add_one(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 1

    layer.register_forward_hook(add_one)
    return layer


def parametrized(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Scaled())


def adapted(layer: nn.Linear) -> nn.Module:
    return nn.Sequential(layer, Scaled())


def wrapped(layer: nn.Linear) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda input: forward(input) + 1  # noqa: A006
    return layer


def subclassed(layer: nn.Linear) -> nn.Module:
    class Weight(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    return layer


@pytest.mark.parametrize("change", [biased, hooked, parametrized, adapted, wrapped, subclassed])
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_layer_that_is_not_plain_is_called(threads: int, change: Any, parts: list[int]) -> None:
    torch.manual_seed(0)
    layer = change(nn.Linear(24, 36, bias=False))
    x = torch.randn(1, 1, 24)
    assert torch.equal(project(layer, x), layer(x))
    assert parts == []
