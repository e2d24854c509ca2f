"""Models whose linear layers another tool has replaced or changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.model.models import make_ids, make_model
from torch import Tensor, nn
from torch.nn import functional as F

LINEAR_LAYERS = 2 * 4 + 1  # of two blocks, and the head


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per row; it has no parameter `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale = nn.Buffer(scale)
        self.int8 = nn.Buffer((linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.int8.float() * self.scale)


class LowRank(nn.Module):
    """An adapter: the layer as it is, and a small change."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replace_linear_layers(module: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace each module whose type is exactly nn.Linear, as tools do; how many there were."""
    count = 0
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, replacement(child))
            count += 1
        else:
            count += replace_linear_layers(child, replacement)
    return count


def continuation(model: Any, prompt: Tensor, use_cache: bool) -> Tensor:
    return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=use_cache)


@pytest.mark.parametrize("replacement", [Int8Linear, LowRank])
@pytest.mark.parametrize("fields", [{}, {"position_embedding": "rope", "qk_norm": True}], ids=["ls", "rope"])
def test_all_linear_layers_are_found_and_decode(replacement: Any, fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    prompt = make_ids(length=9)
    before = model(prompt).logits
    assert replace_linear_layers(model, replacement) == LINEAR_LAYERS
    assert not torch.equal(model(prompt).logits, before)
    assert torch.equal(*(continuation(model, prompt, use_cache) for use_cache in (True, False)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_torch_quantizes_all_linear_layers() -> None:
    """It scales the inputs too, by all tokens of a call: texts with and without cache may differ."""
    model = make_model()
    prompt = make_ids(length=9)
    before = model(prompt).logits
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    error = ((model(prompt).logits - before).norm() / before.norm()).item()
    assert 0 < error < 0.2
    assert continuation(model, prompt, use_cache=True).shape == (2, 21)


def test_int8_weights_are_close() -> None:
    model = make_model()
    prompt = make_ids(length=9)
    before = model(prompt).logits
    replace_linear_layers(model, Int8Linear)
    assert (model(prompt).logits - before).norm() < 0.05 * before.norm()
