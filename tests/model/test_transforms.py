"""The model under transforms of torch.func."""

import pytest
import torch
from tests.model.models import make_ids, make_model
from torch.func import functional_call, grad, jvp, vmap


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 2, "sink_logits": True, "num_global_heads": 2}]
)
def test_gradients_of_each_sample_and_tangents(shape: dict):
    model, ids = make_model(**shape).double(), make_ids(batch=3)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict, ids: torch.Tensor) -> torch.Tensor:
        arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
        return functional_call(model, parameters, kwargs=arguments).loss.double()

    gradients = grad(loss)(parameters, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-5, atol=1e-6)
    by_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, ids[:, None])
    means = {name: value.mean(0) for name, value in by_sample.items()}
    torch.testing.assert_close(means, gradients, rtol=1e-5, atol=1e-6)
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
    tangent = jvp(lambda parameters: loss(parameters, ids), (parameters,), (tangents,))[1]
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


def test_a_range_is_checked_outside_of_transforms_alone():
    model = make_model()
    with pytest.raises(ValueError, match="input_ids must be at least 0"):
        model(input_ids=torch.full((1, 3), 1000))
