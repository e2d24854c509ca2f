"""Training `LongShortForCausalLM`: losses, gradient checkpointing, compilation, bf16."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.model.models import SHAPES, VOCAB, make_ids, make_model
from torch import Tensor
from transformers.utils.generic import find_labels

from longshort.huggingface.cache_name import CACHE_NAME


def test_labels_are_shifted_inside() -> None:
    model = make_model()
    ids = make_ids()
    labels = ids.clone()
    labels[0, 3:6] = labels[1, 0] = -100
    out = model(ids, labels=labels)
    log_probabilities = out.logits.double().log_softmax(-1)
    losses = [
        -log_probabilities[row, t, labels[row, t + 1]].item()
        for row in range(2)
        for t in range(12)
        if labels[row, t + 1] != -100
    ]
    assert len(losses) == 21
    assert out.loss.item() == pytest.approx(sum(losses) / 21, rel=1e-5)
    scaled = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    assert scaled.item() == pytest.approx(sum(losses) / 100, rel=1e-5)


def test_shift_labels_predict_after_every_token() -> None:
    model = make_model()
    tokens = make_ids(length=14)
    ids, following = tokens[:, :-1], tokens[:, 1:]  # not contiguous
    out = model(ids, shift_labels=following)
    expected = F.cross_entropy(out.logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(out.loss, expected)
    ignored = following.masked_fill(following % 2 == 0, -100)
    expected = F.cross_entropy(out.logits.flatten(0, 1), ignored.flatten(), reduction="sum") / 7
    torch.testing.assert_close(model(ids, shift_labels=ignored, num_items_in_batch=7).loss, expected)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=following).loss, out.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_a_loss_over_no_target_spoils_no_accumulated_batch(name: str, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    nothing = {name: torch.full_like(make_ids(), -100)}
    model(make_ids(), labels=make_ids()).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for items, loss in ((None, math.nan), (7, 0.0), (torch.tensor(7), 0.0), (0, math.nan)):
        out = model(make_ids(), num_items_in_batch=items, **nothing)
        (out.loss / 2).backward()
        assert torch.equal(out.loss.isnan(), torch.tensor(math.isnan(loss))) and out.loss.nan_to_num() == 0
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected, rtol=0, atol=0)


def test_autocast_trains_in_bf16() -> None:
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(make_ids(), labels=make_ids())
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    exact = make_model().train()
    exact(make_ids(), labels=make_ids()).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        cosine = F.cosine_similarity(parameter.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.99, name


def test_bf16_weights() -> None:
    model = make_model(position_embedding="rope", global_position_embedding="alibi")
    exact = model(make_ids()).logits
    out = model.to(torch.bfloat16)(make_ids(), labels=make_ids())
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), exact, rtol=0.1, atol=0.15)


def test_the_model_learns_its_batch() -> None:
    model = make_model(initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(make_ids(), labels=make_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < 0.3


def loss_and_gradients(model: Any, **call: Any) -> tuple[Tensor, list[Tensor]]:
    loss = model(make_ids(), shift_labels=make_ids(seed=2), **call).loss
    parameters = list(model.parameters())
    return loss, list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_gradient_checkpointing_changes_no_bit(fields: dict[str, Any]) -> None:
    model = make_model(**fields).train()
    segment_ids = torch.tensor([[0] * 6 + [1] * 7] * 2)
    for call in ({}, {"segment_ids": segment_ids}):
        loss, gradients = loss_and_gradients(model, **call)
        model.activation_checkpointing_enable()
        recomputed: list[int] = []
        handle = model.model.layers[0].attention.register_forward_hook(
            lambda *_, seen=recomputed: seen.append(1)
        )
        checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, **call)
        handle.remove()
        model.activation_checkpointing_disable()
        assert len(recomputed) == 2
        assert torch.equal(loss, checkpointed_loss)
        assert all(torch.equal(*pair) for pair in zip(gradients, checkpointed_gradients, strict=True))


def test_gradient_checkpointing_and_caches_exclude_each_other() -> None:
    model = make_model().train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="do not go with gradient checkpointing in training"):
        model(make_ids(), use_cache=True)
    assert model(make_ids()).past_key_values is None
    assert model.eval()(make_ids(), use_cache=True).past_key_values.get_seq_length() == 13


SEGMENTS = torch.tensor([[0] * 6 + [1] * 7] * 2)
MASK = torch.tensor([[0] * 3 + [1] * 10, [1] * 13])


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({}, [{}, {"segment_ids": SEGMENTS}, {"attention_mask": MASK}]),
        ({"position_embedding": "rope", "global_position_embedding": "none", "qk_norm": True}, [{}]),
        ({"position_embedding": "alibi", "attention_precision": "bf16"}, [{"segment_ids": SEGMENTS}]),
        ({"attention_precision": "sdpa-bf16"}, [{}]),
    ],
    ids=["learned", "rope", "alibi-bf16", "sdpa-bf16"],
)
def test_training_compiles_without_graph_breaks(fields: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    torch.compiler.reset()
    model = make_model(**fields).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in calls:
        model.zero_grad()
        compiled(make_ids(), labels=make_ids(), **call).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(make_ids(), labels=make_ids(), **call).loss.backward()
        expected = [parameter.grad for parameter in model.parameters()]
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_what_the_trainer_of_transformers_reads() -> None:
    """It evaluates on all arguments whose name has "label" in it, and passes others to **kwargs."""
    model = make_model()
    assert find_labels(type(model)) == ["labels"]
    parameters = inspect.signature(model.forward).parameters.values()
    assert any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    assert [*model.config.keys_to_ignore_at_inference, "loss"] == [CACHE_NAME, "loss"]
    assert isinstance(model.config.keys_to_ignore_at_inference, list)
