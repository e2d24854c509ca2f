"""`LogitMonitor`: exact numbers for all families and implementations, and no trace in the model."""

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.huggingface.watched_decoders import (
    FAMILIES,
    Captured,
    capture_eager,
    make_decoder,
    make_llama,
    tokens,
    truth_of,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from longshort import HeadLayout
from longshort.huggingface import LogitMonitor
from longshort.layers import LongShortAttention, Rotary
from longshort.stability import AttentionMonitor, Reading


def padded(ids: Tensor) -> Tensor:
    """A mask with padding on the left of the first sequence and on the right of the second."""
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:] = 0, 0
    return mask


def read(model: Any, *args: Any, **kwargs: Any) -> Reading:
    with torch.no_grad(), LogitMonitor(model) as monitor:
        model(*args, use_cache=False, **kwargs)
    return monitor.reading()


def assert_true(reading: Reading, calls: list[Captured]) -> None:
    """The numbers err at most twice as much as those from all logits in the same precision."""
    exact, plain = ([truth_of(call, dtype) for call in calls] for dtype in (torch.float64, None))
    assert reading.row_range_by_head is not None
    for name, found in (
        ("max_logit", reading.max_logit_by_head),
        ("entropy", reading.entropy_by_head),
        ("row_range", reading.row_range_by_head),
    ):
        wanted, rounded, measured = (
            torch.tensor(values, dtype=torch.float64)
            for values in ([getattr(x, name) for x in exact], [getattr(x, name) for x in plain], found)
        )
        slack = 2 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (measured - wanted).abs().max() <= 2 * (rounded - wanted).abs().max() + slack, name
    assert reading.max_logit == max(max(heads) for heads in reading.max_logit_by_head)
    assert reading.row_range == max(max(heads) for heads in reading.row_range_by_head)


def only_first_layer(reading: Reading) -> Reading:
    assert reading.row_range_by_head is not None
    logits, ranges = reading.max_logit_by_head[:1], reading.row_range_by_head[:1]
    return replace(
        reading, max_logit_by_head=logits, entropy_by_head=reading.entropy_by_head[:1],
        row_range_by_head=ranges, max_logit=max(logits[0]), row_range=max(ranges[0]),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_all_logits_in_float64(family: str) -> None:
    model, ids = make_decoder(family).eval(), tokens()
    model.set_attn_implementation("eager")
    for options in ({}, {"attention_mask": padded(ids)}):
        assert_true(read(model, ids, **options), capture_eager(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt-neox", "deepseek-v3", "qwen3-next"])
def test_sdpa_shows_the_same_pairs_as_eager(family: str) -> None:
    model, ids = make_decoder(family).eval(), tokens()
    model.set_attn_implementation("sdpa")
    for options in ({}, {"attention_mask": padded(ids)}):
        calls = capture_eager(model, ids, use_cache=False, **options)
        assert_true(only_first_layer(read(model, ids, **options)), calls[:1])  # others get other inputs


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_shows_the_same_pairs_as_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_decoder(family).eval()
    model.set_attn_implementation("flex_attention")
    flex: Any = transformers.integrations.flex_attention
    monkeypatch.setattr(  # compiling takes minutes
        flex,
        "compile_friendly_flex_attention",
        lambda *args, training, **kw: flex.flex_attention(*args, **kw),
    )
    monkeypatch.setattr(
        transformers.masking_utils,
        "create_block_mask",
        lambda *args, _compile, **kw: create_block_mask(*args, **kw),
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


def test_the_entropy_is_the_mean_over_all_rows() -> None:
    model = make_llama()
    parts = [tokens(batch, length) for batch, length in ((1, 20), (3, 5), (1, 1))]
    with torch.no_grad(), LogitMonitor(model) as monitor:
        for part in parts:
            model(part, use_cache=False)
    together, alone = monitor.reading(), [read(model, part) for part in parts]
    rows = [part.numel() for part in parts]
    for layer, heads in enumerate(together.entropy_by_head):
        for head, entropy in enumerate(heads):
            each = [reading.entropy_by_head[layer][head] for reading in alone]
            weighted = sum(mean * count for mean, count in zip(each, rows, strict=True)) / sum(rows)
            assert entropy == pytest.approx(weighted, rel=1e-6)


def test_decoding_with_a_cache_sees_all_its_keys() -> None:
    model, ids = make_decoder("mistral").eval(), tokens(length=12)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        with LogitMonitor(model) as monitor:
            model(ids[:, 8:], past_key_values=cache)
    calls = capture_eager(model, ids)
    for call in calls:
        call.q, call.mask = call.q[:, :, 8:], call.mask[:, :, 8:]
    assert_true(monitor.reading(), calls)


def test_step_measures_the_first_and_every_kth() -> None:
    model = make_llama()
    numbers = []
    with LogitMonitor(model, every=3) as monitor:
        for number in range(1, 8):
            model(tokens(seed=number), use_cache=False)
            is_wrapped = "eager" in ALL_ATTENTION_FUNCTIONS  # it has no entry of its own
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


def test_a_function_that_is_registered_meanwhile_is_called_at_once_and_later() -> None:
    model, calls = make_llama(), []
    before, plain = dict(ALL_ATTENTION_FUNCTIONS), ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return plain(*args, **kwargs)

    try:
        with LogitMonitor(model) as monitor:
            model(tokens())
            AttentionInterface.register("sdpa", mine)
            model(tokens(seed=1))
        assert len(calls) == 2  # layers
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        model(tokens())
        assert len(calls) == 4
        both = monitor.reading().max_logit
        assert both == max(read(model, tokens(seed=seed)).max_logit for seed in (0, 1))
    finally:
        AttentionInterface.register("sdpa", plain)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


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


def test_layers_are_told_apart_whatever_their_names() -> None:
    """A linear layer called attention has no logits; a vocabulary projection called decoder is no decoder."""
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2,
    }  # fmt: skip
    kinds = ["linear_attention", "full_attention"]
    hybrid = transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(
            **shape, layer_types=kinds, num_local_experts=2, head_dim=8, num_key_value_heads=4
        )
    )
    bert = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**shape))
    for model, layers in (
        (hybrid, ["layers.1.self_attn"]),
        (bert, ["model.layers.0.attn", "model.layers.1.attn"]),
    ):
        with torch.no_grad(), LogitMonitor(model) as monitor:
            model(tokens())
        assert monitor.layer_names == layers
        assert len(monitor.reading().max_logit_by_head) == len(layers)


def test_gradient_checkpointing_changes_no_number() -> None:
    model, ids = make_llama(), tokens()
    plain = read(model, ids)
    for reentrant in (False, True):
        checkpointed = copy.deepcopy(model)
        checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            checkpointed.enable_input_require_grads()
        with LogitMonitor(checkpointed) as monitor:
            checkpointed(ids, labels=ids, use_cache=False).loss.backward()
        assert monitor.reading() == plain


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's
def test_under_compile_the_graph_is_watched_and_left_again() -> None:
    model, ids = make_llama(num_hidden_layers=1), tokens()
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
