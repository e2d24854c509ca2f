"""Training of decoders that attend by layouts: checkpointed, compiled, in bf16."""

import copy
import pickle

import pytest
import torch
from tests.huggingface.decoders import VOCAB, make_decoder

from longshort.huggingface import apply, remove


def tokens():
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


def make_model(family="llama", **changes):
    model = make_decoder(family, **changes)
    heads = 6 if family == "gpt2" else 3
    apply(model, num_global_heads=6 // heads, window=5, sink_tokens=2)
    return model.train()


def losses(model, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    truth = losses(make_model())
    model = make_model()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert losses(model) == truth and truth[-1] < truth[0]


def test_a_compiled_model_has_no_graph_breaks_and_the_same_losses():
    truth = losses(make_model(num_hidden_layers=1))
    model = make_model(num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert losses(compiled) == pytest.approx(truth, rel=1e-5)


def test_a_compiled_model_follows_new_layouts():
    model = make_model(num_hidden_layers=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(tokens(), use_cache=False)
        apply(model, num_global_heads=0, window=3)
        found = compiled(tokens(), use_cache=False).logits
        torch.testing.assert_close(found, model(tokens(), use_cache=False).logits)


def test_a_model_that_was_never_called_compiles(tmp_path):
    model = make_model(num_hidden_layers=1).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(loaded, fullgraph=True, backend="eager")(tokens(), use_cache=False).logits
        torch.testing.assert_close(found, model(tokens(), use_cache=False).logits)


def test_bf16_errs_at_most_twice_as_much_as_eager_attention_does():
    model = make_decoder("llama").double()
    apply(model, num_global_heads=6, window=5)  # as the model itself attends
    with torch.no_grad():
        truth = model(tokens()).logits
        errors = []
        for implementation in ("longshort", "eager"):
            low = copy.deepcopy(model).bfloat16()
            low.set_attn_implementation(implementation)
            errors.append((low(tokens()).logits.double() - truth).abs().mean().item())
    assert errors[0] <= 2 * errors[1]


def test_autocast():
    model, truth = make_model(), make_model()
    remove(truth)
    apply(model, num_global_heads=6, window=5)  # as the model itself attends
    with torch.autocast("cpu", torch.bfloat16):
        assert losses(model) == pytest.approx(losses(truth), rel=0.02)


def test_copies_and_pickles_keep_their_layouts():
    model = make_model().eval()
    truth = model(tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()).logits, truth)
