import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.layer_cases import LAYOUT, make_input, make_layer
from torch import Tensor, nn

from longshort.layers import ATTENTION_PRECISIONS, LongShortAttention
from longshort.layout import HeadLayout
from longshort.stability import GradientError, audit_rounding
from longshort.stability.rounding import AUDITED, ErrorSums

Q_ROWS, K_ROWS = 6 * 8, 3 * 8


def make_model() -> Any:
    return nn.Sequential(make_layer(seed=1), make_layer(HeadLayout((None, 3)), seed=2))


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(batch).square().mean()


def make_batches(count: int, length: int = 11) -> list[Tensor]:
    return [2 * make_input(length=length, seed=10 + index) for index in range(count)]


def plant(layer: LongShortAttention, change: Callable[[Tensor], Tensor], precision: str = "fp32") -> None:
    """Change the gradients of a layer's projection in one precision."""
    layer.qkv_proj.weight.register_hook(
        lambda gradient: change(gradient) if layer.attention_precision == precision else gradient
    )


def by_place(errors: list[GradientError]) -> dict[tuple[int, str], GradientError]:
    return {(error.layer, error.matrix): error for error in errors}


def test_the_numbers_follow_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(5, 7, 3, generator=generator)
    gradients = references * 1.02 + 0.01 * torch.randn(5, 7, 3, generator=generator) + 0.005
    sums = ErrorSums()
    for gradient, reference in zip(gradients, references, strict=True):
        sums.add(gradient, reference)
    found = sums.error("bf16", 3, "k")
    r, e = references.double().flatten(1), (gradients.double() - references.double()).flatten(1)
    bias = (e * r).sum(1) / (r * r).sum(1)
    squares = (e - e.mean(0)).square().sum(1)
    assert (found.precision, found.layer, found.matrix) == ("bf16", 3, "k")
    assert found.bias == pytest.approx(bias.mean().item())
    assert found.bias_error == pytest.approx(bias.std().item() / math.sqrt(5))
    assert found.noise == pytest.approx((squares.mean().sqrt() / r.mean(0).norm()).item())
    assert found.mean_error == pytest.approx((e.mean(0).norm() / (squares.sum() / 20).sqrt()).item())


def test_a_planted_bias_is_found_where_it_is_and_only_there() -> None:
    model = make_model()

    def lengthen_queries(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:Q_ROWS] * 1.125, gradient[Q_ROWS:]])

    def shorten_keys(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:16], gradient[16:32] * 0.75, gradient[32:]])

    plant(model[0], lengthen_queries)
    plant(model[1], shorten_keys)
    found = by_place(audit_rounding(model, loss_of(model), make_batches(4), ["fp32"]))
    expected = {(0, "q"): 0.125, (0, "k"): 0.0, (1, "q"): 0.0, (1, "k"): -0.25}
    assert found.keys() == expected.keys()
    for place, bias in expected.items():
        assert found[place].bias == pytest.approx(bias, abs=1e-5)
        assert found[place].bias_error < 1e-5


def test_a_common_error_is_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = make_model()
    loss_of(clean)(make_batches(1)[0]).backward()
    weight = clean[0].qkv_proj.weight
    assert isinstance(weight.grad, Tensor)
    size = 0.1 * weight.grad[:Q_ROWS].norm().item() / math.sqrt(Q_ROWS * 20)

    def mean_error(common: float, noise: float) -> GradientError:
        model = make_model()
        direction = size * torch.randn(weight.shape, generator=generator)
        plant(
            model[0],
            lambda gradient: (
                gradient + common * direction + noise * size * torch.randn(weight.shape, generator=generator)
            ),
        )
        return by_place(audit_rounding(model, loss_of(model), make_batches(16), ["fp32"]))[0, "q"]

    only_noise = mean_error(0.0, 1.0)
    assert 0.8 < only_noise.mean_error < 1.2
    assert abs(only_noise.bias) < 4 * only_noise.bias_error
    both = mean_error(1.0, 1.0)
    assert 0.8 * math.sqrt(17) < both.mean_error < 1.2 * math.sqrt(17)
    assert both.noise == pytest.approx(only_noise.noise, rel=0.1)
    assert mean_error(1.0, 0.01).mean_error > 100


def test_precisions_differ_as_their_rounding_does() -> None:
    model = make_model()
    errors = audit_rounding(model, loss_of(model), make_batches(4, length=40))
    assert [(error.precision, error.layer, error.matrix) for error in errors] == [
        (precision, layer, matrix) for precision in AUDITED for layer in (0, 1) for matrix in ("q", "k")
    ]
    noise = {
        precision: [error.noise for error in errors if error.precision == precision] for precision in AUDITED
    }
    assert max(noise["fp32"]) < 1e-5
    for precision in AUDITED[1:]:
        assert all(1e-4 < value < 0.1 for value in noise[precision])
    assert len({tuple(values) for values in noise.values()}) == len(AUDITED)


def test_the_truth_has_no_error() -> None:
    model = make_model()
    for error in audit_rounding(model, loss_of(model), make_batches(2), ["fp64"]):
        assert error.bias == error.bias_error == error.noise == 0.0
        assert math.isnan(error.mean_error)


def test_the_model_stays_as_it_was() -> None:
    model = make_model()
    model[1].attention_precision = "bf16"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit_rounding(model, loss_of(model), make_batches(2))
    assert [layer.attention_precision for layer in model] == ["input", "bf16"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    def fails(batch: Tensor) -> Tensor:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        audit_rounding(model, fails, make_batches(2))
    assert [layer.attention_precision for layer in model] == ["input", "bf16"]


def test_progress_counts_the_batches() -> None:
    model = make_model()
    seen: list[tuple[int, ...]] = []
    audit_rounding(model, loss_of(model), make_batches(3), ["fp32"], lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_gradients_that_are_not_finite_give_no_finite_number() -> None:
    model = make_model()
    plant(model[0], lambda gradient: gradient * math.inf)
    found = by_place(audit_rounding(model, loss_of(model), make_batches(2), ["fp32"]))
    for matrix in ("q", "k"):
        error = found[0, matrix]
        assert not any(map(math.isfinite, (error.bias, error.bias_error, error.noise, error.mean_error)))
    assert abs(found[1, "q"].bias) < 1e-5


def test_bad_arguments_are_named() -> None:
    model = make_model()
    loss = loss_of(model)
    with pytest.raises(ValueError, match="the number of batches must be an integer >= 2, got 1"):
        audit_rounding(model, loss, make_batches(1))
    with pytest.raises(ValueError, match=r"precisions must be some of \('input', .*got 'fp8'"):
        audit_rounding(model, loss, make_batches(2), ["fp8"])
    with pytest.raises(ValueError, match=r"precisions must be some of .*got none"):
        audit_rounding(model, loss, make_batches(2), [])
    with pytest.raises(ValueError, match="model must have LongShortAttention layers"):
        audit_rounding(nn.Linear(3, 3), loss, make_batches(2))
    capped = make_layer(LAYOUT, softcap=3.0)
    with pytest.raises(ValueError, match=r"'sdpa-bf16' does not go with softcap=3\.0"):
        audit_rounding(capped, loss_of(capped), make_batches(2))
    allowed = [name for name in ATTENTION_PRECISIONS if name != "sdpa-bf16"]
    assert len(audit_rounding(capped, loss_of(capped), make_batches(2), allowed)) == 2 * len(allowed)
