"""Losses of layouts, measured from the first layer that differs on."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conversion.models import random_llama, random_windows

from longshort.conversion import losses
from longshort.conversion.heads import find_heads
from longshort.conversion.losses import LossMeter, attending, token_losses
from longshort.huggingface import apply, layouts_of

WINDOWS = random_windows(2, 30)
SETS = st.sets(st.integers(0, 5))


@pytest.fixture(scope="module")
def model():
    model = random_llama()
    heads = find_heads(model)
    apply(model, heads.layouts(heads.candidates, 1, 0))
    return model


@pytest.fixture(scope="module")
def heads(model):
    return find_heads(model)


@pytest.fixture(scope="module")
def other():
    return random_llama()


def measured_plainly(model, heads, kept) -> list[float]:
    """The losses by `apply` and plain forward passes."""
    apply(model, heads.layouts(kept, 4, 1))
    with torch.no_grad():
        logits = model(WINDOWS).logits[:, :-1]
    return [F.cross_entropy(row, ids[1:]).item() for row, ids in zip(logits, WINDOWS, strict=True)]


@settings(max_examples=10)
@given(base=SETS, kept=SETS)
def test_skipping_layers_changes_no_loss(model, heads, other, base, kept):
    base, kept = (frozenset(heads.candidates[index] for index in some) for some in (base, kept))
    meter = LossMeter(model, heads, WINDOWS, 4, 1)
    assert meter.measure_base(base) == meter.measure(base)
    found = meter.measure(kept)
    assert found == LossMeter(model, heads, WINDOWS, 4, 1).measure(kept)
    assert found == pytest.approx(measured_plainly(other, heads, kept), rel=1e-5)


def test_earlier_layers_are_skipped(model, heads):
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_args, index=index: calls.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    meter = LossMeter(model, heads, WINDOWS[:1], 4, 1)
    everything = frozenset(heads.candidates)
    meter.measure_base(everything)
    meter.measure(everything - {heads.candidates[-1]})  # the first also compares with a whole pass
    calls.clear()
    meter.measure(everything - {heads.candidates[-2]})
    assert calls == [2]
    calls.clear()
    meter.measure(everything - {heads.candidates[0], heads.candidates[-1]})
    assert calls == [0, 1, 2]
    for hook in hooks:
        hook.remove()


def test_a_decoder_whose_layers_cannot_be_skipped_is_measured_whole(model, heads, monkeypatch):
    everything = frozenset(heads.candidates)
    kept = everything - {heads.candidates[-1]}
    truth = LossMeter(model, heads, WINDOWS, 4, 1).measure(kept)

    meter = LossMeter(model, heads, WINDOWS, 4, 1)
    meter.measure_base(everything)
    for store in meter._stores:  # as of a decoder that keeps something between its layers
        store._outputs[1] = store._outputs[1] + 1.0
    assert meter.measure(kept) == truth

    monkeypatch.setattr(losses, "_LARGEST_STORE", 100)
    meter = LossMeter(model, heads, WINDOWS, 4, 1)
    meter.measure_base(everything)
    assert meter._stores == []
    assert meter.measure(kept) == truth


def test_other_layouts_hold_only_inside(model, heads):
    before = layouts_of(model)
    with torch.no_grad():
        truth = token_losses(model, WINDOWS[0])
        with attending(heads.layouts((), 2, 0)):
            assert not torch.equal(token_losses(model, WINDOWS[0]), truth)
        assert torch.equal(token_losses(model, WINDOWS[0]), truth)
    assert layouts_of(model) == before
