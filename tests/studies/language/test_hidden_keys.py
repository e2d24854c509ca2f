"""Training with hidden keys: against softmax over the visible keys alone, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longshort.layers import LongShortAttention, Observation
from longshort.model import LongShortForCausalLM, preset
from longshort.stability import AttentionMonitor, AttentionProbe
from longshort.studies.language.hidden_keys import hide_keys

LENGTH = 40
TOKENS = torch.arange(3 * LENGTH).remainder(251).view(3, LENGTH) * 97 % 257
LAYOUTS = [[[5, None, 5, 9], [None] * 4], [[None] * 4] * 2]


def built(share: float | None, layouts=None, seed: int = 0, **fields) -> LongShortForCausalLM:
    """A model in training mode, with weights that make its attention far from uniform."""
    config = preset("tiny", max_position_embeddings=LENGTH, layouts=layouts or LAYOUTS[0], **fields)
    model = LongShortForCausalLM(config)
    model.draw_weights(3)
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.qkv_proj.weight *= 12
    if share is not None:
        hide_keys(model, share, seed)
    return model.train()


def attention_layers(model: LongShortForCausalLM) -> list[LongShortAttention]:
    return [module for module in model.modules() if isinstance(module, LongShortAttention)]


def observed(model: LongShortForCausalLM, tokens: Tensor = TOKENS) -> list[tuple[Observation, Tensor]]:
    """What each layer's attention got, and what it gave to the output projection, by head."""
    seen: list[Observation] = []
    outputs: list[Tensor] = []
    hooks = []
    for layer in attention_layers(model):
        layer.observer = seen.append
        hooks.append(layer.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])))
    model(tokens, use_cache=False)
    for layer, hook in zip(attention_layers(model), hooks, strict=True):
        layer.observer = None
        hook.remove()
    by_head = [out.view(*tokens.shape, 4, 16).transpose(1, 2) for out in outputs]
    return list(zip(seen, by_head, strict=True))


def hidden_of(model: LongShortForCausalLM, tokens: Tensor = TOKENS) -> Tensor:
    """The keys that no later query of a global head sees, found by their gradients: (batch, sequence)."""
    (observation, out), *_ = observed(model, tokens)
    head = 1 if attention_layers(model)[0].layout.windows[1] is None else 0
    grad = torch.autograd.grad(out[:, head, -1].sum(), observation.v)[0][:, head]
    return (grad == 0).all(-1)[:, :-1]  # the last query sees itself


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_only_the_visible_keys_get_weight(share, layouts):
    model = built(share, layouts)
    hidden = hidden_of(model)
    counts = hidden.sum(-1) - round(share * LENGTH)
    assert counts.min() >= -1 and counts.max() <= 0  # the last key, which is left out, may be hidden too
    queries, keys = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    for layer, (observation, out) in zip(attention_layers(model), observed(model), strict=True):
        q, k, v = (x.detach().double() for x in (observation.q, observation.k, observation.v))
        scores = q @ k.mT / 4
        for head, window in enumerate(layer.layout.windows):
            visible = (keys <= queries) & (queries - keys < (window or LENGTH))
            is_hidden = torch.nn.functional.pad(hidden, (0, 1))
            visible = visible & (~is_hidden[:, None] | (keys == queries))
            seen = scores[:, head].masked_fill(~visible, -math.inf)
            shares = seen.softmax(-1)
            torch.testing.assert_close(out[:, head].double(), shares @ v[:, head], rtol=1e-5, atol=1e-5)
            stats = observation.stats
            entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1).mean()
            for ours, truth in (
                (stats.max_logit[head], scores[:, head].abs().masked_fill(~visible, 0.0).max()),
                (stats.entropy[head], entropy),
                (stats.lse[:, head], seen.logsumexp(-1)),
            ):
                torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_share_of_zero_is_ordinary_attention(layouts, precision):
    losses, gradients = [], []
    for share in (None, 0.0):
        model = built(share, layouts, attention_precision=precision)
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in model.parameters()])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.02, "atol": 0.002}
    torch.testing.assert_close(*losses, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)


def test_the_keys_follow_from_the_seed_and_the_tokens_alone():
    mixed, mhsa = (hidden_of(built(0.5, layouts)) for layouts in LAYOUTS)
    assert torch.equal(mixed, mhsa)
    model = built(0.5)
    assert torch.equal(hidden_of(model), mixed)  # the state of torch's own generator does not matter
    assert torch.equal(hidden_of(model, TOKENS[[2, 0]]), mixed[[2, 0]])  # nor do the other sequences
    assert not torch.equal(mixed[0], mixed[1])
    assert not torch.equal(hidden_of(built(0.5, seed=1)), mixed)
    first, second = (
        hidden_of(built(share, layouts=[[None] * 4, [5] * 4])) for share in (0.5, 0.75)
    )  # a larger share hides more of the same keys
    assert (second | ~first).all()


def test_gradients_flow_to_every_parameter():
    model = built(0.75)
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_in_evaluation_every_key_is_visible():
    plain, hiding = built(None).eval(), built(0.75)
    hiding(TOKENS, use_cache=False)
    hiding.eval()
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, hiding(TOKENS).logits)
        probes = [AttentionProbe(model, 5) for model in (plain, hiding)]
        for model, probe in zip((plain, hiding), probes, strict=True):
            with probe.observing():
                model(TOKENS, use_cache=False)
        assert probes[0].reading() == probes[1].reading()
        assert hiding.train()(TOKENS).logits.ne(plain(TOKENS).logits).any()


def test_a_monitor_changes_nothing():
    model = built(0.5)
    monitor = AttentionMonitor(model, None)
    expected = model(TOKENS, use_cache=False).logits
    with monitor.observing():
        found = model(TOKENS, use_cache=False).logits
    assert torch.equal(found, expected)
    assert monitor.reading().max_logit > 0


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share must be a number from 0"):
        built(share)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"softcap": 5.0}, "softcap"),
        ({"sink_logits": True}, "sink_logits"),
        ({"sink_tokens": 2}, "sink_tokens"),
        ({"position_embedding": "alibi"}, "alibi_slopes"),
        ({"attention_precision": "bf16-flash"}, "attention_precision 'bf16-flash'"),
        ({"attention_precision": "sdpa-bf16"}, "attention_precision 'sdpa-bf16'"),
    ],
)
def test_layers_that_cannot_hide_keys_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"got one with {message}"):
        built(0.5, **fields)


def test_segments_are_refused():
    with pytest.raises(ValueError, match="do not go with segment_ids"):
        built(0.5)(TOKENS, segment_ids=torch.zeros_like(TOKENS))
