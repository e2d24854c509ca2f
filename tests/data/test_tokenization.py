import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import longshort
from longshort.data.tokenization import (
    Encoder,
    byte_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 20,
    "def f(x):\n    return x + 1\n" * 30,
    "größer " * 40,
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
UGLY = "  two  spaces\r\n\ttab é 𝄞 \u200b ﬁ e\u0301 <|endoftext|> , . n't \0"


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(CORPUS, 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, bpe: PreTrainedTokenizerFast) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    byte_tokenizer().save_pretrained(root / "bytes")
    bpe.save_pretrained(root / "bpe")
    return {name: root / name for name in ("bytes", "bpe")}


def test_byte_ids_are_byte_values() -> None:
    tokenizer = byte_tokenizer()
    assert vocabulary_size(tokenizer) == len(tokenizer) == 257
    assert tokenizer.eos_token_id == 256
    (ids,) = Encoder(tokenizer).encode([UGLY])
    assert bytes(ids.tolist()) == UGLY.encode()
    assert tokenizer.decode(list(range(128))) == bytes(range(128)).decode()


@given(st.lists(TEXTS, max_size=4))
@example([UGLY])
@example([""])
def test_byte_encoder_agrees_with_the_tokenizer_itself(texts: list[str]) -> None:
    tokenizer = byte_tokenizer()
    quick = Encoder(tokenizer).encode(texts)
    for text, ids in zip(texts, quick, strict=True):
        assert ids.tolist() == tokenizer.encode(text, split_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_every_text_round_trips(saved: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(saved[name])
    encoder = Encoder(tokenizer)

    @given(TEXTS)
    @example(UGLY)
    def check(text: str) -> None:
        (ids,) = encoder.encode([text])
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size(tokenizer) - 1

    check()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_saved_tokenizers_load_with_auto_tokenizer(saved: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved[name])
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    text = "plain text\n"
    assert tokenizer(text)["input_ids"] == Encoder(load_tokenizer(saved[name])).encode([text])[0].tolist()
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_end_of_text_in_a_document_stays_text(saved: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(saved[name])
    (ids,) = Encoder(tokenizer).encode(["a<|endoftext|>b"])
    assert tokenizer.eos_token_id not in ids
    assert len(ids) > 3


def test_bpe_learns_from_its_texts_and_is_deterministic(bpe: PreTrainedTokenizerFast) -> None:
    again = train_bpe([CORPUS], 300)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    assert vocabulary_size(bpe) == 300
    encoded = Encoder(bpe).encode(CORPUS)
    assert sum(map(len, encoded)) < sum(len(text.encode()) for text in CORPUS) / 2


def test_bpe_of_a_small_corpus_has_fewer_pieces() -> None:
    assert vocabulary_size(train_bpe(["abab"], 1000)) < 270


@pytest.mark.timeout(60)
def test_bpe_trains_on_text_without_spaces_in_reasonable_time() -> None:
    text = "xy" * 750_000
    tokenizer = train_bpe([text, *CORPUS], 300)
    (ids,) = Encoder(tokenizer).encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert len(ids) < 300_000
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_bpe_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 258 for BPE, got 257"):
        train_bpe(CORPUS, 257)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_among_the_texts_ends_the_training(error: type[BaseException]) -> None:
    def texts():
        yield "text"
        raise error("stop")

    with pytest.raises(error, match="stop"):
        train_bpe(texts(), 300)


def test_encoder_ignores_the_tokenizers_own_settings_and_leaves_them(bpe: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    before = tokenizer.backend_tokenizer.to_str()
    text = "the quick brown fox"
    assert Encoder(tokenizer).encode([text])[0].tolist() == bpe.encode(text)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_no_warning_about_length(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    short = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer, eos_token="<|endoftext|>", model_max_length=4
    )
    short.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "the quick brown fox " * 100
    with caplog.at_level("WARNING"):
        assert len(tokenizer(text)["input_ids"]) > 4
        assert len(Encoder(tokenizer).encode([text])[0]) > 4
    assert caplog.text == ""


def test_loading_says_what_is_wrong(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_fast_form_cannot_encode() -> None:
    with pytest.raises(ValueError, match=r"tokenizer must have a fast form .* got a ByT5Tokenizer"):
        Encoder(ByT5Tokenizer())


def test_a_tokenizer_without_end_of_text_gets_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 2)
    assert vocabulary_size(tokenizer) == 3


def test_vocabulary_size_counts_gaps(bpe: PreTrainedTokenizerFast) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a")), eos_token="b"
    )
    assert vocabulary_size(tokenizer) == 70_001


def test_hash_tells_tokenizers_apart(saved: dict[str, Path], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_hash(tmp_path) == tokenizer_hash(saved["bytes"]) != tokenizer_hash(saved["bpe"])
    assert re.fullmatch("[0-9a-f]{64}", tokenizer_hash(tmp_path))


def test_arrays_are_compact(bpe: PreTrainedTokenizerFast) -> None:
    assert Encoder(byte_tokenizer()).encode(["abc"])[0].dtype == np.uint8
    assert Encoder(bpe).encode(["abc"])[0].dtype == np.uint32


def test_a_fork_after_parallel_encoding_is_silent_and_works() -> None:
    script = """
import os
from longshort.data.tokenization import Encoder, train_bpe
encoder = Encoder(train_bpe(["some text", "other words"] * 50, 280))
encoder.encode(["many words"] * 500)
child = os.fork()
if child == 0:
    encoder.encode(["many words"] * 500)
    # Not every version of tokenizers warns; each is silent where this is set.
    os._exit(7 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert "TOKENIZERS_PARALLELISM" not in os.environ
"""
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = str(Path(longshort.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
