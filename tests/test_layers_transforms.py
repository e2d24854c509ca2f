"""The layer under transforms of torch.func."""

import pytest
import torch
from tests.layer_cases import make_input, make_layer
from torch.func import functional_call, grad, jvp, vmap

OPTIONS = [{}, {"qk_norm": True, "sink_logits": True, "softcap": 5.0}, {"short_convolution": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tangents_and_gradients_of_parameters(options: dict):
    layer = make_layer(dtype=torch.float64, **options)
    x = make_input().double()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}

    def loss(parameters: dict, x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (x,)).sin().sum()

    gradients = grad(loss)(parameters, x)
    layer(x).sin().sum().backward()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad)
    tangent = jvp(lambda parameters: loss(parameters, x), (parameters,), (tangents,))[1]
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    torch.testing.assert_close(tangent, expected)
    by_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    torch.testing.assert_close({name: value.sum(0) for name, value in by_sample.items()}, gradients)


def test_a_named_backend_without_tangents_is_refused():
    layer, x = make_layer(backend="cpu"), make_input()
    with pytest.raises(ValueError, match="backend 'cpu' cannot serve this call: forward-mode"):
        jvp(layer, (x,), (x,))
