"""z-loss, the rate of queries and keys, QK-clip: their formulas, what they leave alone and refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longshort.layers import LongShortAttention, Rotary
from longshort.layout import HeadLayout
from longshort.stability import AttentionMonitor, QKClip, scale_qk_learning_rate, z_loss


def test_z_loss_is_the_mean_squared_normaliser_of_what_is_predicted() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.zeros(3, 5, dtype=torch.int64)
    squares = logits.double().exp().sum(-1).log().square()
    torch.testing.assert_close(z_loss(logits).double(), squares.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(z_loss(logits, labels), z_loss(logits))
    labels[0], labels[2, 3] = -100, -100
    torch.testing.assert_close(z_loss(logits, labels).double(), squares[labels == 0].mean())
    assert z_loss(logits, torch.full_like(labels, -100)) == 0
    assert z_loss(logits[:0]) == 0


def test_z_loss_is_computed_in_fp32_and_pulls_the_normaliser_to_one() -> None:
    logits = torch.full((1, 4), 20.0, dtype=torch.bfloat16, requires_grad=True)
    loss = z_loss(logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((20 + math.log(4)) ** 2, rel=1e-6)
    loss.backward()
    assert logits.grad is not None and (logits.grad > 0).all()


def test_z_loss_takes_no_gradient_of_what_is_not_predicted() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    z_loss(logits, torch.tensor([1, -100])).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[1], torch.zeros(4)) and logits.grad[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, ([1.0],), "logits must be a torch.Tensor, got list"),
        (TypeError, (torch.zeros(2, 3), [1, 2]), "labels must be a torch.Tensor, got list"),
        (ValueError, (torch.zeros(2, 3), torch.zeros(3)), r"labels must have .*\(2,\), got \(3,\)"),
    ],
)
def test_z_loss_names_bad_input(error: type[Exception], arguments: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        z_loss(*arguments)


LAYOUTS = {
    "own-keys": HeadLayout.split(4, 1, 3),
    "shared-keys": HeadLayout((3, 3, None, None), num_kv_heads=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": Rotary()},
    "convolution": {"short_convolution": 3},
    "softcap-alibi": {"softcap": 2.0, "alibi_slopes": (0.5, 0.25, 0.0, 0.125)},
}


def make_layer(layout: HeadLayout, **options: Any) -> LongShortAttention:
    torch.manual_seed(0)
    layer = LongShortAttention(16, layout, 8, **options)
    with torch.no_grad():
        layer.qkv_proj.weight.mul_(4)
        if layer.short_convolution is not None:
            layer.short_convolution.weight.normal_()
    return layer


def max_logits(layer: LongShortAttention, x: Tensor) -> list[float]:
    monitor = AttentionMonitor(layer, None)
    with monitor.observing():
        layer(x)
    return monitor.reading().max_logit_by_head[0]


def rows(layer: LongShortAttention) -> Tensor:
    return layer.qkv_proj.weight.detach().clone().unflatten(0, (-1, 8))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_clipped_heads_come_down_to_the_threshold_and_the_others_keep_every_bit(
    layout: HeadLayout, options: dict[str, Any]
) -> None:
    layer = make_layer(layout, **options)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    before, old_rows = max_logits(layer, x), rows(layer)
    threshold = sum(sorted(before)[1:3]) / 2  # two heads are above it
    assert QKClip(layer, threshold).apply([before]) == 2
    after, new_rows = max_logits(layer, x), rows(layer)
    for head in range(4):
        own_rows = [head] if layout.group_size > 1 else [head, 4 + head]
        if before[head] > threshold:
            assert after[head] == pytest.approx(threshold, rel=1e-5)
            factor = (threshold / before[head]) ** (1 / len(own_rows))
            torch.testing.assert_close(new_rows[own_rows], old_rows[own_rows] * factor)
        else:
            assert after[head] == before[head]
            assert torch.equal(new_rows[own_rows], old_rows[own_rows])
    values = slice(-layout.num_kv_heads, None)
    assert torch.equal(new_rows[values], old_rows[values])
    if layout.group_size > 1:
        assert torch.equal(new_rows[4:], old_rows[4:])


@pytest.mark.parametrize("max_logit", [5.0, 0.0, math.nan, math.inf])
def test_heads_at_the_threshold_or_not_finite_are_left_alone(max_logit: float) -> None:
    layer = make_layer(LAYOUTS["own-keys"])
    before = rows(layer)
    assert QKClip(layer, 5.0).apply([[max_logit] * 4]) == 0
    assert torch.equal(rows(layer), before)


def test_each_layer_has_its_own_numbers() -> None:
    layers = [make_layer(LAYOUTS["own-keys"]) for _ in range(2)]
    before = rows(layers[0])
    assert QKClip(torch.nn.ModuleList(layers), 1.0).apply([[0.5] * 4, [0.5, 2.0, 0.5, 0.5]]) == 1
    assert torch.equal(rows(layers[0]), before)
    assert not torch.equal(rows(layers[1]), before)


def test_qk_clip_names_bad_input() -> None:
    layer = make_layer(LAYOUTS["own-keys"])
    for threshold in (0.0, math.nan, -1, None):
        with pytest.raises(ValueError, match="threshold must be a finite number > 0"):
            QKClip(layer, threshold)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear without"):
        QKClip(torch.nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match="model must have no QK-norm"):
        QKClip(make_layer(LAYOUTS["own-keys"], qk_norm=True), 1.0)
    with pytest.raises(ValueError, match=r"max_logit_by_head must have \[4\] heads by layer, got \[3\]"):
        QKClip(layer, 1.0).apply([[1.0] * 3])


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, rate, weight_decay=0.1),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, rate, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_factor_is_another_rate_for_the_rows_of_queries_and_keys(layout: HeadLayout, make: Any) -> None:
    layers = [make_layer(layout).double() for _ in range(3)]
    scaled, fast, slow = layers
    optimizers = [
        make(layer.parameters(), rate) for layer, rate in zip(layers, (0.1, 0.1, 0.01), strict=True)
    ]
    scale_qk_learning_rate(scaled, optimizers[0], 0.1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in scaled.named_parameters():
            gradient = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            for layer in layers:
                layer.get_parameter(name).grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    heads = layout.num_heads + layout.num_kv_heads
    torch.testing.assert_close(rows(scaled)[:heads], rows(slow)[:heads], rtol=1e-12, atol=1e-13)
    assert torch.equal(rows(scaled)[heads:], rows(fast)[heads:])
    assert torch.equal(scaled.o_proj.weight, fast.o_proj.weight)


def test_a_shared_projection_is_scaled_once() -> None:
    first, second = (make_layer(LAYOUTS["own-keys"]) for _ in range(2))
    second.qkv_proj = first.qkv_proj
    optimizer = torch.optim.SGD(first.parameters(), 1.0)
    before = rows(first)
    scale_qk_learning_rate(torch.nn.ModuleList([first, second]), optimizer, 0.25)
    first.qkv_proj.weight.grad = torch.ones_like(first.qkv_proj.weight)
    optimizer.step()
    torch.testing.assert_close(rows(first)[:8], before[:8] - 0.25)
    torch.testing.assert_close(rows(first)[8:], before[8:] - 1.0)


def test_the_learning_rate_factor_names_bad_input() -> None:
    layer = make_layer(LAYOUTS["own-keys"])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for factor in (0.0, -1.0, math.nan, math.inf, True, None):
        with pytest.raises(ValueError, match="factor must be a finite number > 0"):
            scale_qk_learning_rate(layer, optimizer, factor)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear without"):
        scale_qk_learning_rate(torch.nn.Linear(2, 2), optimizer, 0.5)
    with pytest.raises(ValueError, match=r"optimizer must hold qkv_proj\.weight of all layers"):
        scale_qk_learning_rate(make_layer(LAYOUTS["own-keys"]), optimizer, 0.5)
