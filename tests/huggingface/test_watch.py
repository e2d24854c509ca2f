"""`LogitMonitor`: exact numbers for all families and implementations, and no trace in the model."""

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from tests.huggingface.watched_decoders import (
    FAMILIES,
    capture_eager,
    make_decoder,
    make_llama,
    tokens,
    truth_of,
)
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longshort import HeadLayout
from longshort.huggingface import LogitMonitor
from longshort.layers import LongShortAttention, Rotary
from longshort.stability import AttentionMonitor, Reading

CLOSE = {"rel": 1e-9, "abs": 1e-9}  # float64 against float64


def padded(ids: Tensor) -> Tensor:
    """A mask with padding on the left of the first sequence and on the right of the second."""
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:] = 0, 0
    return mask


def read(model: Any, *args: Any, **kwargs: Any) -> Reading:
    with torch.no_grad(), LogitMonitor(model) as monitor:
        model(*args, use_cache=False, **kwargs)
    return monitor.reading()


def assert_true(reading: Reading, model: Any, *args: Any, **kwargs: Any) -> None:
    calls = [truth_of(call) for call in capture_eager(model, *args, use_cache=False, **kwargs)]
    assert reading.row_range_by_head is not None
    assert len(calls) == len(reading.max_logit_by_head) > 0
    for layer, call in enumerate(calls):
        assert reading.max_logit_by_head[layer] == pytest.approx(call.max_logit, **CLOSE)
        assert reading.entropy_by_head[layer] == pytest.approx(call.entropy, **CLOSE)
        assert reading.row_range_by_head[layer] == pytest.approx(call.row_range, **CLOSE)
    assert reading.max_logit == max(max(heads) for heads in reading.max_logit_by_head)
    assert reading.row_range == max(max(heads) for heads in reading.row_range_by_head)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_all_logits_in_float64(family: str) -> None:
    model = make_decoder(family).double().eval()
    ids = tokens()
    assert_true(read(model, ids, attention_mask=padded(ids)), model, ids, attention_mask=padded(ids))
    assert_true(read(model, ids), model, ids)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt-neox", "deepseek-v3", "qwen3-next"])
def test_sdpa_shows_the_same_pairs_as_eager(family: str) -> None:
    model = make_decoder(family).double().eval()
    model.set_attn_implementation("sdpa")
    ids = tokens()
    assert_true(read(model, ids), model, ids)
    assert_true(read(model, ids[:1]), model, ids[:1])
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    calls = read(model, ids, attention_mask=mask)
    assert_true(calls, model, ids, attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_shows_the_same_pairs_as_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_decoder(family).eval()
    model.set_attn_implementation("flex_attention")
    flex = transformers.integrations.flex_attention
    monkeypatch.setattr(  # compiling takes minutes
        flex,
        "compile_friendly_flex_attention",
        lambda *args, training, **kw: flex.flex_attention(*args, **kw),
    )
    ids = tokens()
    found = read(model, ids, attention_mask=padded(ids))
    model.set_attn_implementation("eager")
    assert found.as_metrics() == same_up_to_rounding(read(model, ids, attention_mask=padded(ids)))


def same_up_to_rounding(reading: Reading) -> Any:
    def close(value: Any) -> Any:
        if isinstance(value, list):
            return [close(part) for part in value]
        return value if value is None else pytest.approx(value, rel=1e-5)

    return {name: close(value) for name, value in reading.as_metrics().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_losses_and_gradients_keep_every_bit(family: str, implementation: str) -> None:
    if implementation == "sdpa" and family in ("gemma2", "gpt-oss"):
        implementation = "eager"
    model = make_decoder(family)
    model.set_attn_implementation(implementation)
    ids = tokens()

    def step() -> list[Tensor]:
        model.zero_grad()
        output = model(ids, attention_mask=padded(ids), labels=ids, use_cache=False)
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [output.loss.detach(), output.logits.detach(), *(gradient.clone() for gradient in gradients)]

    random_state = torch.random.get_rng_state()
    plain = step()
    with LogitMonitor(model) as first, LogitMonitor(model) as second:
        watched = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert first.reading() == second.reading()


def test_a_head_is_local_if_its_layer_has_a_sliding_window() -> None:
    model = make_decoder("gemma2")  # a sliding and a full layer
    reading = read(model, tokens())
    assert reading.max_logit_local == max(reading.max_logit_by_head[0])
    assert reading.max_logit_global == max(reading.max_logit_by_head[1])
    assert read(make_decoder("llama"), tokens()).max_logit_local is None
    assert read(make_decoder("mistral"), tokens()).max_logit_global is None


def test_several_passes_give_the_maxima_and_the_means() -> None:
    model = make_llama()
    parts = [tokens(seed=seed) for seed in range(3)]
    with torch.no_grad(), LogitMonitor(model) as monitor:
        for part in parts:
            model(part, use_cache=False)
    together, alone = monitor.reading(), [read(model, part) for part in parts]
    assert together.max_logit == max(reading.max_logit for reading in alone)
    for layer, heads in enumerate(together.entropy_by_head):
        for head, entropy in enumerate(heads):
            parts_of_it = [reading.entropy_by_head[layer][head] for reading in alone]
            assert entropy == pytest.approx(sum(parts_of_it) / 3, rel=1e-12)


def test_decoding_with_a_cache_sees_all_its_keys() -> None:
    model = make_decoder("mistral").double().eval()
    ids = tokens(length=12)
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        with LogitMonitor(model) as monitor:
            model(ids[:, 8:], past_key_values=cache)
    calls = capture_eager(model, ids)
    for call, found in zip(calls, monitor.reading().max_logit_by_head, strict=True):
        call.q, call.mask = call.q[:, :, 8:], call.mask[:, :, 8:]
        assert found == pytest.approx(truth_of(call).max_logit, **CLOSE)


def test_step_measures_the_first_and_every_kth() -> None:
    model = make_llama()
    numbers = []
    with LogitMonitor(model, every=3) as monitor:
        for number in range(1, 8):
            model(tokens(seed=number), use_cache=False)
            is_wrapped = "eager" in ALL_ATTENTION_FUNCTIONS
            reading = monitor.step()
            assert is_wrapped == (reading is not None)
            if reading is not None:
                numbers.append(number)
                assert reading == read(model, tokens(seed=number))
    assert numbers == [1, 3, 6]


def test_nothing_is_left_behind() -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    model = make_llama()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    model.lm_head.weight.data = torch.zeros(3, 3)  # fails after the layers
    with pytest.raises(RuntimeError, match="shapes"), LogitMonitor(model) as first, LogitMonitor(model):
        model(tokens())
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert first.reading().max_logit > 0  # what was measured stays


def test_monitors_end_in_any_order() -> None:
    before, model = dict(ALL_ATTENTION_FUNCTIONS), make_llama()
    first, second = LogitMonitor(model), LogitMonitor(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model(tokens())
    second.__exit__(None, None, None)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert second.reading().max_logit > 0
    with pytest.raises(RuntimeError, match="no attention of LlamaForCausalLM was observed"):
        first.reading()


def test_a_monitor_that_is_dropped_stops() -> None:
    before, model = dict(ALL_ATTENTION_FUNCTIONS), make_llama()
    LogitMonitor(model).__enter__()
    gc.collect()
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_functions_of_others_survive() -> None:
    model = make_llama()

    def mine(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    try:
        ALL_ATTENTION_FUNCTIONS["mine"] = mine
        with LogitMonitor(model):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = mine  # registered by somebody else meanwhile
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert ALL_ATTENTION_FUNCTIONS["mine"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["mine"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not mine


def test_other_models_are_not_measured() -> None:
    model, other = make_llama(), make_llama(seed=1)
    with LogitMonitor(model) as monitor:
        other(tokens())
        model(tokens())
    assert monitor.reading() == read(model, tokens())
    assert monitor.layer_names == []  # nothing since the reading


def test_an_attention_that_is_not_dispatched_raises() -> None:
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with LogitMonitor(falcon) as monitor:
        falcon(tokens())
    with pytest.raises(RuntimeError, match=r"attention of h\.0\.self_attention, h\.1.* was not observed"):
        monitor.reading()
    partly = make_llama()
    layer = partly.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with LogitMonitor(partly) as monitor:
        partly(tokens())
    with pytest.raises(RuntimeError, match=r"attention of layers\.1\.self_attn ran but was not observed"):
        monitor.reading()


def test_gradient_checkpointing_changes_no_number() -> None:
    model, ids = make_llama(), tokens()
    plain = read(model, ids)
    for reentrant in (False, True):
        checkpointed = copy.deepcopy(model)
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            checkpointed.enable_input_require_grads()
        with LogitMonitor(checkpointed) as monitor:
            checkpointed(ids, labels=ids, use_cache=False).loss.backward()
        assert monitor.reading() == plain


def test_lora_and_autocast_are_seen() -> None:
    import peft

    base, ids = make_llama(), tokens()
    adapted = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )
    found = read(adapted, ids)
    assert len(found.max_logit_by_head) == 2
    assert found != read(base, ids)
    merged = adapted.merge_and_unload()
    assert found.as_metrics() == same_up_to_rounding(read(merged, ids))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(base, ids)
    assert rounded.max_logit == pytest.approx(read(base, ids).max_logit, rel=0.05)
    assert rounded != read(base, ids)


def test_under_compile_the_graph_is_watched_and_left_again() -> None:
    model, ids = make_llama(), tokens()
    compiled: Any = torch.compile(model, backend="aot_eager")
    plain = compiled(ids, labels=ids, use_cache=False)
    for _ in range(2):
        with LogitMonitor(compiled) as monitor:
            watched = compiled(ids, labels=ids, use_cache=False)
        torch.testing.assert_close(watched.loss, plain.loss)
        assert monitor.reading().as_metrics() == same_up_to_rounding(read(model, ids))
        with LogitMonitor(make_llama(seed=1)):
            compiled(ids, use_cache=False)
        compiled(ids, use_cache=False)
        with pytest.raises(RuntimeError, match="no attention"):
            monitor.reading()


def test_layers_of_ours_are_watched_too() -> None:
    layout = HeadLayout((3, 3, None, None), num_kv_heads=2, sink_tokens=2)
    layer = LongShortAttention(16, layout, 8, rotary=Rotary(), softcap=3.0, alibi_slopes=(0.5, 0.2, 0.1, 0.0))
    layer = layer.double()
    hidden = 3 * torch.randn(2, 20, 16, dtype=torch.float64)
    segments = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 20])
    ours = AttentionMonitor(layer, band=None, row_range=True)
    with ours.observing(), LogitMonitor(layer) as monitor:
        layer(hidden, segment_ids=segments)
    assert monitor.reading().as_metrics() == same_up_to_rounding(ours.reading())


@pytest.mark.parametrize(
    ("error", "model", "options", "message"),
    [
        (TypeError, "llama", {}, "model must be a torch.nn.Module, got str"),
        (ValueError, None, {"every": 0}, "every must be an integer >= 1, got 0"),
        (ValueError, None, {"every": 1.5}, "every must be an integer >= 1, got 1.5"),
    ],
)
def test_bad_input(error: type[Exception], model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        LogitMonitor(make_llama() if model is None else model, **options)


def test_a_monitor_is_entered_once() -> None:
    monitor = LogitMonitor(make_llama())
    with monitor, pytest.raises(RuntimeError, match="is watching already"), monitor:
        pass
