"""Layouts in the decoders of transformers, against their own eager attention under explicit masks."""

import copy
import json
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from tests.huggingface.decoders import CONFIGS, VOCAB, attend_by_masks, make_decoder, make_seeing_decoder

from longshort import HeadLayout
from longshort.huggingface import SplitCache, apply, attention_layers, layouts_of, remove, split_cache

LENGTH = 24


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def heads_to_keep(model):
    layer = attention_layers(model)[0]
    return layer.num_heads // layer.num_kv_heads


def applied(family, **options) -> tuple[Any, list[Any]]:
    model = make_decoder(family)
    return model, apply(
        model, **{"num_global_heads": heads_to_keep(model), "window": 5, "sink_tokens": 2, **options}
    )


def inputs_of(kind):
    """Inputs of a model, and the segments that they mean."""
    ids = tokens()
    segments = torch.zeros_like(ids)
    if kind == "packed":
        segments[:, 7:] = 1
        segments[:, 15:] = 2
        positions = torch.cat([torch.arange(7), torch.arange(8), torch.arange(LENGTH - 15)])
        return {"input_ids": ids, "position_ids": positions.expand(2, -1)}, segments
    if kind == "padded":
        segments[0, :5] = -1
        segments[1, -5:] = -1
    inputs = {"input_ids": ids}
    if kind == "packed and padded":
        segments[:, 7:] = 1
        segments[:, 20:] = -1
        inputs["position_ids"] = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).expand(2, -1)
    if kind in ("padded", "packed and padded"):
        inputs["attention_mask"] = (segments >= 0).long()
    return inputs, segments


@pytest.fixture(scope="module", params=CONFIGS)
def both(request):
    """A family, its model with layouts, these layouts, and another such model to attend by masks."""
    return request.param, *applied(request.param), make_decoder(request.param)


@pytest.mark.parametrize("kind", ["whole", "padded", "packed", "packed and padded"])
def test_logits_and_gradients_are_those_of_eager_attention_under_explicit_masks(both, kind):
    name, model, layouts, other = both
    if name == "lfm2" and kind != "whole":
        pytest.skip("its convolution crosses the bounds of sequences")
    if name == "llama4" and kind != "whole":
        pytest.skip("its chunks begin elsewhere")
    inputs, segments = inputs_of(kind)
    truth = attend_by_masks(other, layouts, segments)
    counts = (segments >= 0)[..., None]
    results = []
    for found in (model, truth):
        found.zero_grad()
        logits = found(**inputs, use_cache=False).logits * counts
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in found.named_parameters() if p.grad is not None}))
    (logits, gradients), (true_logits, true_gradients) = results
    torch.testing.assert_close(logits, true_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, true_gradients[name].abs().max().item())
        torch.testing.assert_close(gradient / scale, true_gradients[name] / scale, rtol=1e-4, atol=1e-5)


def test_windows_matter():
    model, _ = applied("llama")
    ids = tokens()
    local = model(ids).logits
    remove(model)
    own = model(ids).logits
    assert not torch.allclose(local, own, atol=1e-2)
    torch.testing.assert_close(local[:, :5], own[:, :5])  # as far as the windows reach


def test_packed_sequences_by_their_bounds():
    model, _ = applied("llama")
    ids = tokens(batch=1)
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    bounds = torch.tensor([0, 10, LENGTH], dtype=torch.int32)
    packed = model(ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    parts = [model(part).logits for part in ids.split([10, LENGTH - 10], dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_a_mask_of_ones_beside_restarting_positions_hides_nothing_but_other_sequences():
    model, _ = applied("llama")
    inputs, _ = inputs_of("packed")
    packed = model(**inputs).logits
    with_mask = model(**inputs, attention_mask=torch.ones(2, LENGTH, dtype=torch.long)).logits
    torch.testing.assert_close(packed, with_mask)


def test_inference_mode_follows_positions_that_change_in_place():
    model, _ = applied("llama")
    ids = tokens(batch=1)
    with torch.inference_mode():
        positions = torch.arange(LENGTH)[None]
        whole = model(ids, position_ids=positions).logits
        torch.testing.assert_close(whole, model(ids).logits)
        positions[:, 10:] -= 10
        parts = [model(part).logits for part in ids.split([10, LENGTH - 10], dim=1)]
        packed = model(ids, position_ids=positions).logits
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_a_trial_in_one_thread_changes_no_other_model():
    running, _ = applied("llama")
    ids = tokens()
    with torch.no_grad():
        truth = running(ids).logits
        stop, wrong = threading.Event(), []

        def run():
            with torch.no_grad():
                while not stop.is_set():
                    wrong.append(not torch.equal(running(ids).logits, truth))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            for _ in range(5):
                applied("llama")
        finally:
            stop.set()
            thread.join()
    assert wrong and not any(wrong)


def test_layouts_by_layer_are_stored_with_the_config():
    model = make_decoder("llama")
    layouts = [
        HeadLayout((3, 3, None, None, 9, 9), num_kv_heads=3, sink_tokens=1),
        HeadLayout((None,) * 6, num_kv_heads=3),
    ]
    assert apply(model, layouts=layouts) == layouts == layouts_of(model)
    assert model.config._attn_implementation == "longshort"
    truth = attend_by_masks(make_decoder("llama"), layouts, torch.zeros(2, LENGTH))
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, truth(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_later_call_replaces_layouts_and_remove_ends_them():
    model, first = applied("llama")
    ids = tokens()
    with_first = model(ids).logits
    second = apply(model, num_global_heads=0, window=3)
    assert layouts_of(model) == second != first
    assert not torch.allclose(model(ids).logits, with_first, atol=1e-3)
    apply(model, layouts=first)
    torch.testing.assert_close(model(ids).logits, with_first)
    remove(model)
    assert layouts_of(model) is None and model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, make_decoder("llama")(ids).logits)
    with pytest.raises(ValueError, match="must have layouts to remove"):
        remove(model)


def test_sliding_layers_keep_their_window():
    model, layouts = applied("gemma3", window=100)
    assert layouts[0] == HeadLayout((11,) * 6, num_kv_heads=3)
    assert layouts[1] == HeadLayout((100,) * 4 + (None,) * 2, num_kv_heads=3, sink_tokens=2)
    assert apply(model, num_global_heads=6, window=1)[0] == layouts[0]


def test_layers_that_do_not_attend_have_no_layout():
    model, layouts = applied("lfm2")
    assert layouts[0] is None and layouts[1] is not None
    with pytest.raises(ValueError, match="None for layer 0, which does not attend"):
        apply(model, layouts=[layouts[1], layouts[1]])
    with pytest.raises(ValueError, match=r"HeadLayout for model\.layers\.1\.self_attn.*got None"):
        apply(model, layouts=[None, None])


def test_the_trial_changes_nothing_else():
    model = make_decoder("gpt_oss")
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    apply(model, num_global_heads=2, window=4)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Saving


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_layouts_survive_saving_twice(family, tmp_path):
    model, layouts = applied(family)
    ids = tokens()
    truth = model(ids).logits
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config._attn_implementation == "longshort" and layouts_of(model) == layouts
        assert torch.equal(model(ids).logits, truth)
        assert isinstance(model.generate(ids, max_new_tokens=2, return_dict_in_generate=True,
                                         pad_token_id=0).past_key_values, SplitCache)  # fmt: skip


def test_layouts_of_a_model_that_also_sees_are_saved(tmp_path):
    model = make_seeing_decoder()
    apply(model, num_global_heads=2, window=4)
    ids = tokens()
    truth = model(input_ids=ids).logits
    assert model.config.vision_config._attn_implementation != "longshort"
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model: Any = hf.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / name)
        assert model.config.get_text_config()._attn_implementation == "longshort"
        assert model.config.vision_config._attn_implementation != "longshort"
        assert torch.equal(model(input_ids=ids).logits, truth)


LOAD = """
import sys, transformers
for kind, folder in (argument.split("=") for argument in sys.argv[1:]):
    for options in ({}, {"attn_implementation": "sdpa"}):
        try:
            getattr(transformers, kind).from_pretrained(folder, **options)
            print("loaded")
        except Exception as error:
            print(" ".join(str(error).split()))
"""


def test_loading_without_longshort_fails_and_says_what_to_import(tmp_path):
    arguments = []
    for family in ("llama", "gemma3", "seeing"):
        model = make_seeing_decoder() if family == "seeing" else make_decoder(family)
        apply(model, num_global_heads=2, window=4)
        model.save_pretrained(tmp_path / family)
        arguments.append(f"{type(model).__name__}={tmp_path / family}")
    command = [sys.executable, "-c", LOAD, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 6 and all("import longshort.huggingface" in line for line in lines)


def test_loading_with_another_implementation_fails(tmp_path):
    model, layouts = applied("gemma3")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"attn_implementation must be 'longshort'.*got 'eager', which has no"
    ):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longshort")
    assert layouts_of(loaded) == layouts and loaded.config.layer_types == model.config.layer_types
    seeing = make_seeing_decoder()
    apply(seeing, num_global_heads=2, window=4)
    seeing.save_pretrained(tmp_path / "seeing")
    for name in ("sdpa", {"text_config": "sdpa"}):
        with pytest.raises(ValueError, match="attn_implementation must be 'longshort'"):
            hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "seeing", attn_implementation=name)
    names = {"vision_config": "eager"}
    seeing = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "seeing", attn_implementation=names)
    assert seeing.config.text_config._attn_implementation == "longshort"


def test_a_config_from_its_own_data_takes_layouts():
    model, layouts = applied("llama")
    config = type(model.config)(**model.config.to_dict())
    again = hf.AutoModelForCausalLM.from_config(config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert apply(again, layouts=layouts) == layouts


def test_layouts_follow_an_implementation_that_was_set_before():
    model = make_decoder("llama")
    model.set_attn_implementation("longshort")
    apply(model, num_global_heads=2, window=5)
    remove(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_implementation_that_is_not_here_is_not_restored():
    model, layouts = applied("llama")
    model.config.longshort["replaces"] = "flash_attention_2"
    apply(model, layouts=layouts)
    remove(model)
    assert model.config._attn_implementation == "sdpa" and layouts_of(model) is None
    torch.testing.assert_close(model(tokens()).logits, make_decoder("llama")(tokens()).logits)


def test_an_edit_of_the_config_counts():
    model, _ = applied("llama")
    model(tokens())
    for data in model.config.longshort["layouts"]:
        data["windows"] = [3] * 6
    edited = model(tokens()).logits
    apply(model, layouts=[HeadLayout((3,) * 6, 3, sink_tokens=2)] * 2)
    assert torch.equal(edited, model(tokens()).logits)


def test_a_damaged_config_is_refused(tmp_path):
    model, _ = applied("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for damage, reason in (
        ({"layouts": None}, "'layouts', a list"),
        ({"layouts": [{"windows": [1]}] * 2}, "windows, num_kv_heads and sink_tokens"),
        ({"layouts": []}, "layouts of 0 layers, none of layer 0"),
    ):
        config = json.loads(path.read_text())
        config["longshort"] = {**config["longshort"], **damage}
        path.write_text(json.dumps(config))
        damaged = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=reason):
            damaged(tokens())


# Refusals

_MOE = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}  # fmt: skip


def small(config_class, **options):
    base = CONFIGS["llama"]().to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    torch.manual_seed(0)
    settings = {**{name: base[name] for name in kept}, **options}
    return hf.AutoModelForCausalLM.from_config(config_class(**settings))


REFUSED = {
    "no dispatch": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6)),
        "BloomForCausalLM.*do not dispatch",
    ),
    "a sliding layer that passes no window": (
        lambda: small(
            hf.Qwen2MoeConfig, use_sliding_window=True, sliding_window=6, max_window_layers=1, **_MOE
        ),
        r"model\.layers\.\d\.self_attn .Qwen2MoeAttention.*sliding window is 6",
    ),
    "another sliding layer that passes no window": (
        lambda: small(hf.PhimoeConfig, sliding_window=6, num_local_experts=4),
        "PhimoeAttention.*sliding window is 6",
    ),
    "dropout": (
        lambda: make_decoder("llama", attention_dropout=0.1),
        r"model\.layers\.0\.self_attn.*p = 0\.1.*set attention_dropout to 0",
    ),
    "shared keys": (
        lambda: small(
            hf.Gemma3nTextConfig, num_hidden_layers=4, head_dim=8, num_kv_shared_layers=2, laurel_rank=8,
            layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.0] * 4,
        ),
        "attends twice to the same keys",
    ),
    "two attentions in a layer": (
        lambda: small(hf.DiffLlamaConfig, num_attention_heads=4, num_key_value_heads=2),
        "layer 0 attends more than once",
    ),
    "an encoder": (
        lambda: small(hf.BertConfig, attention_probs_dropout_prob=0.0, is_decoder=False),
        "causal",
    ),
    "an encoder and a decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCAB, d_model=48, d_ff=64, num_layers=1, num_heads=6, d_kv=8)
        ),
        "encoder-decoder",
    ),
    "no weights": (lambda: make_decoder("llama").to("meta"), "meta device"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_later_is_refused_at_once(case):
    make, reason = REFUSED[case]
    model = make()
    before, implementation = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    with pytest.raises(ValueError, match=reason):
        apply(model, num_global_heads=2, window=4)
    assert model.config.to_dict() == before and model.config._attn_implementation == implementation


IN_HALF_PRECISION = r"model.layers.1.self_attn \(LlamaAttention\) cannot attend by a layout: "


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float32, "with all heads global its logits differ"),
        (torch.bfloat16, IN_HALF_PRECISION + "with all heads global its outputs differ"),
    ],
)
def test_a_model_whose_attention_is_another_is_refused(dtype, reason):
    model = make_decoder("llama").to(dtype)
    attention = model.model.layers[1].self_attn
    own_forward = attention.forward

    def forward(hidden_states, **options):  # adds a bias of its own to the eager scores
        if attention.config._attn_implementation == "eager":
            options["attention_mask"] = torch.randn(8, 8)
        return own_forward(hidden_states, **options)

    attention.forward = forward
    with pytest.raises(ValueError, match=reason):
        apply(model, num_global_heads=2, window=4)
    assert layouts_of(model) is None


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float32, "with a DynamicCache its logits differ"),
        (torch.float16, IN_HALF_PRECISION + "with a DynamicCache its outputs differ"),
    ],
)
def test_a_model_that_forgets_its_positions_with_a_cache_is_refused(dtype, reason):
    model = make_decoder("llama").to(dtype)
    attention = model.model.layers[1].self_attn
    own_forward = attention.forward

    def forward(hidden_states, position_embeddings, **options):
        if hidden_states.shape[1] == 1:  # as at position 0
            cos, sin = position_embeddings
            position_embeddings = torch.ones_like(cos), torch.zeros_like(sin)
        return own_forward(hidden_states, position_embeddings=position_embeddings, **options)

    attention.forward = forward
    with pytest.raises(ValueError, match=reason):
        apply(model, num_global_heads=2, window=4)


def test_a_model_that_hands_on_other_inputs_with_a_cache_is_refused_in_half_precision():
    model = make_decoder("gpt2").to(torch.bfloat16)
    table = model.transformer.wpe
    own_forward = table.forward
    table.forward = lambda positions: own_forward(positions if positions.shape[1] > 1 else 0 * positions)
    with pytest.raises(ValueError, match=r"h.0.attn .*: with a DynamicCache its inputs differ"):
        apply(model, num_global_heads=2, window=4)


@pytest.mark.parametrize("seed", [1, 8])  # a token of these goes to another expert by rounding
def test_a_mixture_of_experts_in_half_precision_is_not_refused_for_its_rounding(seed):
    config = hf.MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim >= 2 else 1.0)
    assert len(apply(model.to(torch.bfloat16), num_global_heads=2, window=3, sink_tokens=1)) == 6


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({}, ValueError, "needs layouts, or num_global_heads and window"),
        ({"num_global_heads": 2}, ValueError, "needs layouts, or num_global_heads and window"),
        ({"num_global_heads": 2, "window": 0}, ValueError, "window"),
        ({"num_global_heads": True, "window": 4}, ValueError, "num_global_heads"),
        (
            {"num_global_heads": [2], "window": 4},
            ValueError,
            "num_global_heads must have one entry.*2 layers",
        ),
        ({"num_global_heads": 1, "window": 4}, ValueError, r"multiple of the 2.*layers\.0"),
        ({"num_global_heads": 8, "window": 4}, ValueError, r"at most num_heads \(6\)"),
        ({"num_global_heads": 2, "window": 4, "sink_tokens": -1}, ValueError, "sink_tokens"),
        ({"layouts": [HeadLayout((None,) * 6, 3)]}, ValueError, "one entry for each of the 2 layers, got 1"),
        ({"layouts": HeadLayout((None,) * 6, 3)}, TypeError, "layouts must be a list"),
        ({"layouts": ["global"] * 2}, TypeError, "got str for layer 0"),
        ({"layouts": [HeadLayout((None,) * 6)] * 2}, ValueError, r"\(6, 3\), got \(6, 6\)"),
        ({"layouts": [HeadLayout((None,) * 4)] * 2}, ValueError, r"\(6, 3\), got \(4, 4\)"),
        ({"layouts": [HeadLayout((None,) * 6, 3)] * 2, "window": 4}, ValueError, "must come alone"),
    ],
)
def test_bad_arguments(options, error, reason):
    model = make_decoder("llama")
    with pytest.raises(error, match=reason):
        apply(model, **options)
    assert layouts_of(model) is None and model.config._attn_implementation == "eager"


def test_other_objects_than_models_are_refused():
    for call in (lambda x: apply(x, num_global_heads=1, window=1), remove, layouts_of, split_cache):
        with pytest.raises(TypeError, match=r"must be a (PreTrainedModel|model) of transformers"):
            call(torch.nn.Linear(2, 2))


# Calls that a loaded model refuses


def test_bad_calls_are_refused():
    model, _ = applied("llama")
    ids = tokens()
    with pytest.raises(ValueError, match="attention_mask must be the mask of tokens"):
        model(ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    static = hf.StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match="must hold as many keys as tokens"):
        model(ids, past_key_values=static)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        model.train()(ids)


def test_a_split_cache_is_refused_by_other_attention_and_other_layouts():
    model, layouts = applied("llama")
    cache = split_cache(model)
    ids = tokens()
    model(ids, past_key_values=cache)
    apply(model, num_global_heads=0, window=3)
    with pytest.raises(ValueError, match="must have the layouts of this model"):
        model(ids[:, :1], past_key_values=cache)
    apply(model, layouts=layouts)
    cache = split_cache(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(TypeError, match=r"no other attention than longshort's"):
            model(ids, past_key_values=cache)


def test_a_model_without_layouts_has_no_split_cache():
    with pytest.raises(ValueError, match="must have layouts"):
        split_cache(make_decoder("llama"))
    with pytest.raises(ValueError, match="multi-head latent attention"):
        split_cache(applied("deepseek_v3")[0])
    model = make_decoder("llama")
    model.set_attn_implementation("longshort")
    with pytest.raises(ValueError, match=r"call longshort\.huggingface\.apply"):
        model(tokens())
