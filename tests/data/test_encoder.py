"""Long texts are encoded in pieces, and the tokens are those of the whole text."""

import itertools
import json
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from longshort.data import encoder as module
from longshort.data import train_bpe
from longshort.data.encoder import TextEncoder, can_be_cut, cuts

WORDS = (
    "the quick brown fox can't re'd 12345 x1y2\n\n  "
    "def f(x):\r\n\treturn x.\n e\u0301 größer ... 's 'S  \n \n"
)
PIECES = st.sampled_from(
    [
        *WORDS.split(" "),
        " ",
        "  ",
        "\n",
        " \n",
        "\t",
        "\r\n",
        "a",
        "Z",
        "'",
        "é",
        "\u00a0",
        "\u2003",
        "7",
        ".",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=60).map("".join)


def bpe() -> Any:
    return train_bpe([WORDS * 20, "the the fox fox\n\n  return x" * 9], 400).backend_tokenizer


def split(pattern: str) -> Any:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


BEFORE = {
    "gpt-2": gpt2,
    "llama-3": lambda: split(module._PATTERNS[0]),
    "qwen-2": lambda: split(module._PATTERNS[1]),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]),
}


def tokenizer(before: Any, **changes: Any) -> Tokenizer:
    made = bpe()
    made.pre_tokenizer = before
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("piece", [1, 7])
def test_pieces_give_the_tokens_of_the_whole(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", piece)
    made = tokenizer(BEFORE[name](), normalizer=normalizers.NFC() if name == "qwen-2" else None)
    encoder = TextEncoder(made.to_str(), is_bytes=False)
    assert can_be_cut(made.to_str())
    made.encode_special_tokens = True
    cut = 0

    @settings(max_examples=150)
    @given(st.lists(TEXTS, max_size=3))
    @example([WORDS * 20, "", "a b", WORDS])
    def check(texts: list[str]) -> None:
        nonlocal cut
        cut += sum(len(list(cuts(text))) for text in texts)
        whole = [made.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in encoder.encode(texts)] == whole

    check()
    assert cut > 100


@pytest.mark.parametrize("pattern", [r"[ \n](?=[A-Za-z])", r"[a-z](?=[a-z])", r"\s(?=\s)"])
def test_cuts_elsewhere_would_change_tokens(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 3)
    monkeypatch.setattr(module, "_CUT", module.re.compile(pattern))
    made = bpe()
    (ids,) = TextEncoder(made.to_str(), is_bytes=False).encode([WORDS])
    assert ids.tolist() != made.encode(WORDS).ids


def added(content: str, **options: bool) -> Tokenizer:
    made = bpe()
    made.add_tokens([AddedToken(content, **options)])
    return made


@pytest.mark.parametrize(
    ("made", "possible"),
    [
        (lambda: bpe(), True),
        (lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
        (lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), False),
        (lambda: tokenizer(pre_tokenizers.Metaspace()), False),
        (lambda: tokenizer(split(r"\w+\s*")), False),
        (lambda: tokenizer(gpt2(), normalizer=normalizers.NFKC()), False),
        (lambda: tokenizer(gpt2(), normalizer=normalizers.Prepend("_")), False),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), False),
        (lambda: added("<tool>"), True),
        (lambda: added("x y"), False),
        (lambda: added("<tool>", rstrip=True), False),
        (lambda: added("<tool>", single_word=True), False),
        (lambda: added("x y", special=True), True),
    ],
)
def test_only_what_is_proven_is_cut(made: Any, possible: bool) -> None:
    assert can_be_cut(made().to_str()) is possible


def test_a_model_with_dropout_is_not_cut() -> None:
    parts = json.loads(bpe().to_str())
    parts["model"]["dropout"] = 0.1
    assert not can_be_cut(json.dumps(parts))


def test_cuts_are_far_apart_and_lie_between_a_letter_and_a_space() -> None:
    text = "some words, " * 30_000 + "x" * 200_000 + "\nend" + "y z" * 50_000
    places = [0, *cuts(text)]
    assert all(text[place - 1].isalpha() and text[place] in " \n" for place in places[1:])
    assert all(b - a >= 1 << 16 for a, b in itertools.pairwise(places))
    assert len(places) == 9
    assert list(cuts("x" * 1_000_000)) == []


def test_a_long_text_takes_little_more_memory_than_its_tokens() -> None:
    encoder = TextEncoder(bpe().to_str(), is_bytes=False)
    text = "the quick brown fox\n" * 100_000
    tracemalloc.start()
    (ids,) = encoder.encode([text])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * ids.nbytes + 20_000_000
