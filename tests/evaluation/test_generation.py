from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longshort.data import byte_tokenizer, train_bpe
from longshort.evaluation import generate_text, generation
from longshort.huggingface import SplitCache
from longshort.huggingface.cache_name import CACHE_NAME
from longshort.model import kv_bytes, preset
from longshort.model.modeling import LongShortForCausalLM

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER)


class Fake:
    """Predicts by a function of all tokens so far, of which a call brings the new ones only."""

    device = torch.device("cpu")

    def __init__(self, logits, **config):
        self.config = SimpleNamespace(**config)
        self.function = logits
        self.seen = []

    def eval(self):
        return self

    def __call__(self, inputs, use_cache, logits_to_keep, **cache):
        assert not torch.is_grad_enabled()
        self.seen += inputs[0].tolist()
        return SimpleNamespace(logits=self.function(self.seen)[None, None])


def script(tokens, vocab_size=VOCAB):
    """A model that says these tokens, whatever the prompt."""
    state = iter(tokens)

    def logits(_seen):
        return torch.nn.functional.one_hot(torch.tensor(next(state)), vocab_size).float() * 100

    return Fake(logits)


def pieces(model, prompt="", tokenizer=TOKENIZER, **options):
    options = {"max_new_tokens": 100, "temperature": 0, **options}
    return list(generate_text(model, tokenizer, prompt, **options))


def test_characters_come_whole():
    text = "aé€😀z"
    assert pieces(script([*text.encode(), END])) == list(text)


def test_the_end_of_text_ends_it():
    assert pieces(script([*b"ab", END, *b"cd"])) == ["a", "b"]


def test_max_new_tokens_ends_it_with_what_is_left_of_a_character():
    assert "".join(pieces(script("a€".encode()), max_new_tokens=3)) == "a\ufffd"


def test_bytes_that_are_no_text_come_as_replacement_characters():
    assert "".join(pieces(script([*b"a\xffb\xff\xffc\xe2\x82d", END]))) == "a\ufffdb\ufffd\ufffdc\ufffdd"


def test_a_replacement_character_of_the_text_itself_comes_through():
    assert "".join(pieces(script([*"a\ufffdb\ufffd".encode(), END]))) == "a\ufffdb\ufffd"


def test_pieces_of_bpe_join_to_the_text():
    text = "the naïve cat, the naïve 😀 hat; the end"
    tokenizer = train_bpe([text] * 5, 300)
    ids = tokenizer.encode(text)
    made = pieces(script([*ids, tokenizer.eos_token_id], len(tokenizer)), tokenizer=tokenizer)
    assert "".join(made) == text
    assert 1 < len(made) <= len(ids) < len(text)
    assert all(made)


def test_the_prompt_follows_an_end_of_text_and_is_read_once():
    model = script([*b"xy", END])
    assert pieces(model, "a<|endoftext|>") == ["x", "y"]
    assert model.seen == [END, *b"a<|endoftext|>", *b"xy"]


@pytest.mark.parametrize(
    ("prompt", "document_start", "seen"),
    [
        ("ab", "at-end-of-text", [END, *b"ab"]),
        ("", "at-end-of-text", [END]),
        ("ab", "after-end-of-text", [*b"ab"]),
        ("", "after-end-of-text", [END]),  # the model begins with something
    ],
)
def test_separate_documents_begin_where_those_of_the_training_did(prompt, document_start, seen):
    model = script([END])
    assert pieces(model, prompt, separate_documents=True, document_start=document_start) == []
    assert model.seen == seen


def test_documents_that_are_not_separate_always_follow_an_end_of_text():
    model = script([END])
    assert pieces(model, "ab", document_start="after-end-of-text") == []
    assert model.seen == [END, *b"ab"]


def biased():
    """b'a' is twice as likely as b'b', which is twice as likely as b'c'; all else is unlikely."""
    logits = torch.full((VOCAB,), -30.0)
    logits[[97, 98, 99]] = torch.tensor([4.0, 2.0, 1.0]).log()
    return Fake(lambda _seen: logits)


def test_sampling_follows_the_probabilities():
    text = "".join(pieces(biased(), temperature=1, max_new_tokens=3000, seed=1))
    counts = [text.count(letter) / 3000 for letter in "abc"]
    assert counts == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.04)


def test_temperature_sharpens():
    text = "".join(pieces(biased(), temperature=0.5, max_new_tokens=3000, seed=1))
    counts = [text.count(letter) / 3000 for letter in "abc"]
    assert counts == pytest.approx([16 / 21, 4 / 21, 1 / 21], abs=0.04)


def test_top_k_leaves_out_the_others():
    text = "".join(pieces(biased(), temperature=1, top_k=2, max_new_tokens=300))
    assert set(text) == {"a", "b"}
    assert set("".join(pieces(biased(), temperature=1, top_k=10_000, max_new_tokens=300))) == {"a", "b", "c"}


def test_a_tiny_temperature_is_as_good_as_none():
    assert set("".join(pieces(biased(), temperature=1e-30))) == {"a"}
    assert set("".join(pieces(biased(), temperature=0))) == {"a"}


def test_a_seed_repeats_the_text():
    first, again, other = (pieces(biased(), temperature=1, seed=seed) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"seed": -1}, ValueError, "seed"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk"),
        ({"prompt": b"bytes"}, TypeError, "prompt must be a string, got bytes"),
        (
            {"prompt": "abc", "max_new_tokens": 13},
            ValueError,
            "at most 12 here, got 13.*16 positions.*takes 4",
        ),
        ({"prompt": "a" * 40}, ValueError, "at most 0 here"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_the_call(changes, error, message):
    model: Any = Fake(None, position_embedding="learned", max_position_embeddings=16)
    arguments: dict[str, Any] = {"prompt": "a", "max_new_tokens": 3, **changes}
    with pytest.raises(error, match=message):
        generate_text(model, TOKENIZER, arguments.pop("prompt"), **arguments)
    assert not model.seen


def test_what_fits_the_learned_positions_is_made():
    model = Fake(biased().function, position_embedding="learned", max_position_embeddings=16)
    assert len("".join(pieces(model, "abc", max_new_tokens=12))) == 12


def test_a_diverged_model_is_named():
    model = Fake(lambda _seen: torch.full((300,), torch.nan))
    with pytest.raises(ValueError, match="diverged"):
        pieces(model)


def test_a_model_without_a_cache_reads_all_tokens_again():
    calls = []
    model = script([*b"xy", END])
    model.config.short_convolution = 3
    answer = model.function

    def logits(_seen):
        calls.append(list(model.seen))
        model.seen.clear()
        return answer(_seen)

    model.function = logits
    assert pieces(model, "a") == ["x", "y"]
    assert calls == [[END, *b"a"], [END, *b"ax"], [END, *b"axy"]]


def test_a_model_saved_without_use_cache_has_a_cache_all_the_same():
    model = script([*b"xy", END])
    model.config.use_cache = False
    assert pieces(model, "a") == ["x", "y"]
    assert model.seen == [END, *b"a", *b"xy"]


def test_a_model_without_a_cache_takes_no_chunks():
    model: Any = script([END])
    model.config.short_convolution = 3
    with pytest.raises(ValueError, match=r"prefill_chunk must be None .* short_convolution.*, got 4"):
        generate_text(model, TOKENIZER, "a", prefill_chunk=4)


def test_statistics_count_tokens_and_the_models_seconds(monkeypatch):
    """The model takes 3 seconds for each token that it reads; the 100 of who reads the text do not count."""
    now = 0.0
    monkeypatch.setattr(generation, "perf_counter", lambda: now)
    model: Any = script([*b"xyz", END])
    answer = model.function

    def logits(seen):
        nonlocal now
        now += 3.0 * (len(seen) - logits.seen)
        logits.seen = len(seen)
        return answer(seen)

    logits.seen = 0
    model.function = logits
    text = generate_text(model, TOKENIZER, "ab")
    assert (text.statistics.tokens, text.statistics.seconds_to_first_token) == (0, None)
    assert text.statistics.tokens_per_second is None
    for _ in text:
        now += 100.0
    assert (text.statistics.prompt_tokens, text.statistics.tokens) == (3, 4)
    assert text.statistics.seconds_to_first_token == 9.0
    assert text.statistics.seconds_after == 9.0
    assert text.statistics.tokens_per_second == pytest.approx(1 / 3)


def small_model(**fields):
    torch.manual_seed(0)
    return LongShortForCausalLM(preset("tiny", initializer_range=0.3, **fields))


@pytest.mark.parametrize("chunk", [1, 7, 32, 100])
def test_chunks_of_the_prompt_give_the_same_text(chunk):
    model = small_model()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    prompt = "the cat sat on the mat, and so on."  # 35 tokens with the end of text before it
    whole = pieces(model, prompt, max_new_tokens=30)
    assert lengths[:2] == [35, 1]
    lengths.clear()
    assert pieces(model, prompt, max_new_tokens=30, prefill_chunk=chunk) == whole
    assert sum(lengths) == 35 + len(lengths) - -(-35 // chunk)
    assert max(lengths) == min(35, chunk)


def test_longshorts_models_get_their_own_cache():
    model = small_model()
    caches = []
    forward = model.forward

    def spied(*args, **options):
        caches.append(options[CACHE_NAME])
        return forward(*args, **options)

    model.forward = spied
    text = generate_text(model, TOKENIZER, "word " * 10, max_new_tokens=5, temperature=0)
    assert text.statistics.cache_bytes == 0
    assert list(text)
    assert all(isinstance(cache, SplitCache) for cache in caches)
    assert text.statistics.cache_bytes == kv_bytes(model.config, 51 + 4, torch.float32)


def test_a_growing_cache_of_other_models_is_counted():
    model = small_model()

    class Other(Fake):
        def __call__(self, inputs, **options):
            return model(inputs, **options)

    other: Any = Other(None, position_embedding="none")
    text = generate_text(other, TOKENIZER, "word", max_new_tokens=4, temperature=0)
    assert "".join(text) == "".join(pieces(model, "word", max_new_tokens=4))
    assert text.statistics.cache_bytes == kv_bytes(preset("tiny", mhsa=True), 5 + 3, torch.float32)
