"""Slopes at gates and distant mass, against an attention that is written out, in float64."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from tests.conversion.models import random_llama, random_windows
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from longshort.conversion.gates import measure_mass, measure_slopes
from longshort.conversion.heads import KVHead, find_heads
from longshort.huggingface import LogitMonitor, apply

WINDOW, SINKS = 5, 2
WINDOWS = random_windows(2, 24)
GATES = {KVHead(layer, head): 0.1 + 0.15 * (2 * layer + head) for layer in range(3) for head in range(2)}


@pytest.fixture(scope="module")
def model():
    model = random_llama().double()
    heads = find_heads(model)
    apply(model, heads.layouts(heads.candidates, 1, 0))
    return model


def probabilities(q: Tensor, k: Tensor, scaling: float, is_near: bool) -> Tensor:
    """(batch, heads, queries, keys), causal, of global or of local heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    visible = key <= query
    if is_near:
        visible = visible & ((key > query - WINDOW) | (key < SINKS))
    scores = scaling * (q @ k.mT)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def written_out(gates: Tensor, mass: list[Tensor] | None = None):
    """A model whose heads are mixed by gates, (layers, kv_heads)."""

    def attend(module, q, k, v, _mask, scaling, **_unused):
        size = q.shape[1] // k.shape[1]
        v = v.repeat_interleave(size, dim=1)
        distant, near = (probabilities(q, k, scaling, is_near) for is_near in (False, True))
        if mass is not None:
            mass.append((distant * (near == 0)).sum(-1).mean((0, 2)).view(-1, size).mean(1))
        mix = gates[module.layer_idx].repeat_interleave(size)[:, None, None]
        return (mix * (distant @ v) + (1 - mix) * (near @ v)).transpose(1, 2), None

    AttentionInterface.register("written-out", attend)
    AttentionMaskInterface.register("written-out", lambda *_args, **_options: None)
    other = random_llama().double()
    other.set_attn_implementation("written-out")
    return other


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("written-out", None)


def test_slopes_are_derivatives_of_the_loss(model):
    heads = find_heads(model)
    gates = torch.tensor([[GATES[KVHead(layer, head)] for head in range(2)] for layer in range(3)])
    gates = gates.double().requires_grad_()
    other = written_out(gates)
    for window in WINDOWS:
        logits = other(window[None]).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits.float(), window[1:]) / len(WINDOWS)).backward()
    assert gates.grad is not None
    found = measure_slopes(model, heads, GATES, WINDOWS, WINDOW, SINKS)
    for head, slope in found.items():
        assert slope == pytest.approx(gates.grad[head.layer, head.head].item(), rel=1e-5, abs=1e-7)
    assert max(map(abs, found.values())) > 0.01


def test_no_gradient_reaches_a_parameter_and_all_is_as_before(model):
    heads = find_heads(model)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        before = model(WINDOWS).logits
    measure_slopes(model, heads, GATES, WINDOWS, WINDOW, SINKS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    with torch.no_grad():
        assert torch.equal(model(WINDOWS).logits, before)


def test_mass_is_what_distant_keys_get(model):
    heads = find_heads(model)
    mass: list[Tensor] = []
    other = written_out(torch.ones(3, 2).double(), mass)
    with torch.no_grad():
        other(WINDOWS)
    found = measure_mass(model, heads, WINDOWS, [WINDOW, 100], SINKS)
    for head, (outside, nothing) in found.items():
        assert outside == pytest.approx(mass[head.layer][head.head].item(), rel=1e-6)
        assert nothing == pytest.approx(0, abs=1e-12)
        assert 0.1 < outside < 1


def test_slopes_are_the_same_while_the_logits_are_watched(model):
    heads = find_heads(model)
    plain, watched = [], []
    for slopes, context in ((plain, nullcontext()), (watched, LogitMonitor(model))):
        with context:
            slopes.append(measure_slopes(model, heads, GATES, WINDOWS, WINDOW, SINKS))
    assert watched == plain
