import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPT2LMHeadModel

from longshort.bench.attention_providers import visible_pairs
from longshort.bench.benchmark import UnsuitableError
from longshort.bench.model_providers import (
    OURS,
    PROVIDERS,
    Models,
    bytes_of_weights_read,
    local_windows,
    prepare_provider,
)
from longshort.evaluation.generation import cache_bytes
from longshort.huggingface import SplitCache
from longshort.layout import HeadLayout
from longshort.model import LongShortConfig, kv_bytes, prefill_limit, preset

CPU = torch.device("cpu")
CONFIG = preset("tiny", local_window=6, num_global_heads=2, max_position_embeddings=64)


def build(name, config=CONFIG, dtype=torch.float32):
    return prepare_provider(name, config).build(CPU, dtype)


def test_equal_size():
    """But for GPT-2's biases and Mistral's missing table of positions."""
    tokens, width, mlp, layers = 257, 64, CONFIG.intermediate_size, 2
    counts = {name: build(name).num_parameters() for name in PROVIDERS}
    assert counts["ls"] == counts["mhsa"] == counts["hybrid"]
    norms = 2 * layers + 1
    biases = layers * (3 * width + width + mlp + width) + norms * width
    assert counts["gpt2"] == counts["ls"] + biases
    less = 64 * width  # of positions
    assert counts["mistral"] == pytest.approx(counts["ls"] - less, rel=3 * width * layers / counts["ls"])
    assert counts["ls"] == 2 * tokens * width + 64 * width + layers * 12 * width**2 + norms * width


def test_what_each_provider_is():
    assert prepare_provider("ls", CONFIG).layouts == (HeadLayout.split(4, 2, 6),) * 2
    assert prepare_provider("hybrid", CONFIG).layouts == (HeadLayout((6,) * 4), HeadLayout((None,) * 4))
    assert prepare_provider("mistral", CONFIG).layouts == (HeadLayout((6,) * 4),) * 2
    for name in ("mhsa", "gpt2"):
        assert prepare_provider(name, CONFIG).layouts == (HeadLayout((None,) * 4),) * 2
    mhsa = preset("tiny", mhsa=True, local_window=6, max_position_embeddings=64)
    assert prepare_provider("mhsa", CONFIG).config.to_dict() == mhsa.to_dict()
    assert CONFIG.num_global_heads == 2  # it is not changed
    gpt2 = build("gpt2")
    assert isinstance(gpt2, GPT2LMHeadModel)
    assert not gpt2.training
    assert gpt2.config._attn_implementation == "sdpa"
    x = torch.randn(9, dtype=torch.float64)
    assert gpt2.get_submodule("transformer.h.0.mlp.act")(x).equal(F.gelu(x))


@pytest.mark.parametrize(
    ("layers", "global_heads", "full"),
    [(12, 1, [11]), (24, 2, [5, 11, 17, 23]), (12, 5, [2, 4, 7, 9, 11]), (3, 12, [0, 1, 2]), (3, 0, [])],
    ids=str,
)
def test_the_layers_of_the_hybrid(layers, global_heads, full):
    """As many global heads as the model with split heads, spread evenly."""
    config = preset("paper-base", num_hidden_layers=layers, num_global_heads=global_heads)
    hybrid = prepare_provider("hybrid", config)
    local, whole = HeadLayout((100,) * 12), HeadLayout((None,) * 12)
    assert list(hybrid.layouts) == [whole if layer in full else local for layer in range(layers)]
    for length in (50, 1000):
        pairs = [
            sum(layout.score_count(length, length) for layout in of)
            for of in (hybrid.layouts, config.head_layouts())
        ]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "hybrid",
            {"num_global_heads": 1},
            "2 global heads in 2 layers do not make a whole number of layers with 4",
        ),
        ("hybrid", {"local_window": [6, 7]}, r"must have one window, got \[6, 7\]"),
        ("gpt2", {"num_key_value_heads": 2}, "GPT-2 has a key/value head for each head"),
        ("gpt2", {"head_dim": 8}, "hidden_size / heads as head_dim"),
        ("mistral", {"num_global_heads": 4}, "there are none"),
        ("mistral", {"local_window": [6, 7]}, r"must have one window, got \[6, 7\]"),
        ("mistral", {"local_window": 1}, "cannot keep a window of 1"),
    ],
    ids=str,
)
def test_what_a_provider_cannot_follow(name, changes, message):
    config = preset("tiny", **{"num_global_heads": 2, **changes})
    with pytest.raises(UnsuitableError, match=message):
        prepare_provider(name, config)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("length", [4, 20])
def test_attention_alone_is_that_of_the_layers(name, length):
    provider = prepare_provider(name, CONFIG)
    q, k, v = torch.randn(3, 1, 4, length, 16).unbind()
    for layout in provider.layouts:
        out = provider.attend(layout, length, CPU)(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_pairs(layout, length)[None])
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_models_see_what_their_layouts_say(name):
    """The first token moves the last logits only where something sees so far: 2 layers of window 6 do not."""
    model = build(name)
    tokens = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 0] = (tokens[0, 0] + 1) % 257
    with torch.no_grad():
        moved = not torch.equal(model(tokens).logits[0, -1], model(other).logits[0, -1])
    assert moved == (name != "mistral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROVIDERS)
def test_a_filled_cache_takes_tokens(name, dtype):
    provider = prepare_provider(name, CONFIG)
    model = provider.build(CPU, dtype)
    generator = torch.Generator().manual_seed(0)
    cache = provider.filled_cache(model, batch=2, length=40, growth=3, generator=generator)
    assert isinstance(cache, SplitCache if provider.is_ours else DynamicCache)
    assert cache.get_seq_length() == 40
    expected = provider.kv_bytes(40, 2, dtype)
    if name == "mistral":  # which keeps what the next token will see
        expected = 2 * provider.kv_bytes(5, 1, dtype)
    assert cache_bytes(cache) == expected
    with torch.no_grad():
        for _ in range(3):
            out = model(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
            assert out.logits.isfinite().all()
    assert cache.get_seq_length() == 43


def test_bytes():
    provider = prepare_provider("ls", CONFIG)
    model = provider.build(CPU, torch.bfloat16)
    assert provider.weight_bytes(torch.bfloat16) == sum(x.nbytes for x in model.parameters())
    assert provider.kv_bytes(50, 3, torch.bfloat16) == 3 * kv_bytes(CONFIG, 50, torch.bfloat16)
    assert bytes_of_weights_read(model) == sum(
        x.nbytes for name, x in model.named_parameters() if "embed" not in name
    )
    tied = build("gpt2", preset("tiny", tie_word_embeddings=True))
    assert isinstance(tied, GPT2LMHeadModel)
    assert (
        bytes_of_weights_read(tied)
        == sum(x.nbytes for x in tied.parameters()) - tied.transformer.wpe.weight.nbytes
    )


def test_only_a_mask_makes_working_memory_quadratic():
    for name in PROVIDERS:
        provider = prepare_provider(name, CONFIG)
        short, long = (provider.working_bytes(length, 1, torch.float32, CPU) for length in (1000, 2000))
        mask = 1000**2 if name == "mistral" else 0
        assert long - 2 * short == 2 * 5 * mask
        assert provider.mask_bytes(1000) == mask
        assert provider.mask_bytes(6) == 0


def test_long_prompts_take_a_chunk():
    provider, length = prepare_provider("ls", CONFIG), 10**6
    for device in (CPU, torch.device("cuda")):
        assert provider.working_bytes(length, 2, torch.bfloat16, device) == prefill_limit(device.type)


def test_weights_do_not_depend_on_the_generator():
    state = torch.random.get_rng_state()
    first = build("ls")
    assert torch.random.get_rng_state().equal(state)
    torch.randn(3)
    assert first.state_dict()["lm_head.weight"].equal(build("ls").state_dict()["lm_head.weight"])


def test_our_own_are_named():
    assert set(OURS) == {name for name in PROVIDERS if prepare_provider(name, CONFIG).is_ours}


def test_models_are_kept_while_they_are_wanted():
    models = Models(CPU, torch.float32)
    ls = models.of(prepare_provider("ls", CONFIG))
    mhsa = weakref.ref(models.of(prepare_provider("mhsa", CONFIG)))
    models.keep(["gpt2", "ls"])
    assert mhsa() is None
    assert models.of(prepare_provider("ls", CONFIG)) is ls


def test_local_windows():
    assert local_windows(CONFIG) == [6]
    layouts = [[9, 9, None, 4], [4, 4, 9, 9]]
    config = LongShortConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, layouts=layouts)
    assert local_windows(config) == [4, 9]
    assert prepare_provider("mhsa", config).layouts == (HeadLayout((None,) * 4),) * 2
