import pytest
import torch
from torch.nn import functional as F

from longshort.projection import Projection


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
    layer = Projection(24, 36, dtype=dtype)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, layer.weight))
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (x, layer.weight))
    expected = torch.autograd.grad((F.linear(x, layer.weight) * weights).sum(), (x, layer.weight))
    torch.testing.assert_close(got, expected)
    assert layer.bias is None and isinstance(layer, torch.nn.Linear)


def test_few_tokens_are_split_over_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: parts.append(len(a)) or bmm(a, b))
    layer = Projection(24, 36)
    layer(torch.randn(1, 1, 24))
    assert parts == ([] if threads == 1 else [threads])
    layer(torch.randn(1, 17, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 1, 24)).dtype == torch.bfloat16
    assert len(parts) == (threads > 1)
