"""Needles: found by a model that copies, missed by one that does not see so far, and where they stand."""

import math
import random
import re
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from longshort.data import TokenFile, TokenFileWriter, byte_tokenizer, train_bpe
from longshort.evaluation import NeedleCell, measure_needle
from longshort.evaluation.needle import check_needle
from longshort.model import LongShortForCausalLM, preset

TOKENIZER = byte_tokenizer()
TEXT = "DEF ADD(LEFT, RIGHT):\n    RETURN LEFT + RIGHT  # OF TWO NUMBERS\n\n\n"  # nothing like a value
LINE = re.compile(r'\n([A-Z]{6}) = "([a-z]{12})"\n')
QUESTION = re.compile(r'\n([A-Z]{6}) = "([a-z]{11})$')


@pytest.fixture
def token_file(tmp_path: Path) -> TokenFile:
    return write(tmp_path, TEXT * 60)


def write(folder: Path, text: str, vocab_size: int = 257) -> TokenFile:
    with TokenFileWriter(folder / "validation", vocab_size, "hash", "test") as writer:
        writer.add(np.frombuffer(text.encode(), dtype=np.uint8), len(text))
    return TokenFile.open(folder / "validation")


class Copier(nn.Module):
    """Goes on as the text went on after the last time that the newest `match` tokens came before, looking
    `reach` tokens back at most; where they did not it holds all tokens equally likely."""

    def __init__(self, reach: int, match: int = 4, vocab_size: int = 257, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=vocab_size, **config)
        self.reach, self.match = reach, match
        self.calls: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert not self.training and not use_cache and not torch.is_grad_enabled()
        self.calls.append(input_ids)
        batch, length = input_ids.shape
        logits = torch.zeros(batch, length, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for query in range(length - logits_to_keep, length):
                newest = ids[query - self.match + 1 : query + 1]
                for key in range(query, max(self.match, query - self.reach + 1) - 1, -1):
                    if ids[key - self.match : key] == newest:
                        logits[row, query, ids[key]] = 9.0
                        break
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def measure(model: nn.Module, token_file: TokenFile, **changes: Any) -> list[NeedleCell]:
    options: dict[str, Any] = {"lengths": [128], "depths": [0.0, 0.5, 1.0], "samples": 4, **changes}
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return measure_needle(model, tokenizer, token_file, **options).cells


def test_a_model_that_copies_finds_every_needle(token_file: TokenFile) -> None:
    model = Copier(reach=300).train()
    cells = measure(model, token_file, lengths=[128, 256])
    assert model.training
    assert [(cell.length, cell.depth) for cell in cells] == [
        (length, depth) for length in (128, 256) for depth in (0.0, 0.5, 1.0)
    ]
    copied = 9.0 - math.log(256 + math.exp(9))
    for cell in cells:
        assert (cell.accuracy, cell.samples) == (1.0, 4)
        # without the needle all tokens are equally likely
        assert cell.gain == pytest.approx(copied + math.log(257), rel=1e-5)
        assert cell.gain_error == pytest.approx(0, abs=1e-6)


def test_a_model_that_does_not_see_so_far_gains_nothing(token_file: TokenFile) -> None:
    near, far = reversed(measure(Copier(reach=60), token_file, lengths=[256], depths=[0.0, 1.0]))
    assert near.distance < 60 < far.distance
    assert near.accuracy == 1
    assert near.gain > 5
    assert far.gain == pytest.approx(0, abs=1e-6)
    assert far.accuracy == 0


def test_a_window_of_the_distance_just_sees_the_copy(token_file: TokenFile) -> None:
    (cell,) = measure(Copier(reach=300), token_file, depths=[0.3])
    reach = int(cell.distance)
    assert reach == cell.distance
    assert measure(Copier(reach), token_file, depths=[0.3])[0].accuracy == 1
    assert measure(Copier(reach - 1), token_file, depths=[0.3])[0].accuracy == 0


def test_windows_are_as_described(token_file: TokenFile) -> None:
    model = Copier(reach=300)
    depths = [0.0, 0.25, 1.0]
    cells = measure(model, token_file, depths=depths, samples=6, batch_size=5)
    windows = torch.cat(model.calls)
    assert windows.shape == (3 * 6 * 2, 128)
    assert {len(call) for call in model.calls} == {5, 2}
    source = TEXT * 60
    texts = [bytes(window.tolist()).decode() for window in windows]
    samples: dict[float, list[tuple[str, ...]]] = {}
    for pair, (found, missed) in enumerate(zip(texts[0::2], texts[1::2], strict=True)):
        cell = cells[pair // 6]
        question = QUESTION.search(found)
        lines = [LINE.search(text) for text in (found, missed)]
        assert question and all(lines)
        needle, other = (line for line in lines if line)
        assert needle[1] == other[1] == question[1]
        assert needle[2][:-1] == question[2]
        assert needle[2][:4] != other[2][:4]
        assert found.replace(needle[2], other[2], 1) == missed
        before, after = found[: needle.start()], found[needle.end() : question.start()]
        assert before + after in source
        assert len(before) == round(cell.depth * len(before + after))
        first_scored = question.end() - 7
        assert cell.distance == first_scored - (needle.end() - 2 - 8)
        samples.setdefault(cell.depth, []).append((needle[1], needle[2], other[2], before + after))
    assert samples[0.0] == samples[0.25] == samples[1.0]  # the depths share what is random
    assert len(set(samples[0.0])) == 6


def test_it_is_deterministic_and_batches_do_not_matter(token_file: TokenFile) -> None:
    torch.manual_seed(0)
    model = LongShortForCausalLM(preset("tiny", initializer_range=0.3))
    first = measure(model, token_file, seed=3)
    assert measure(model, token_file, seed=3) == first
    assert measure(model, token_file, seed=4) != first
    # one length alone gives what it gives beside others
    assert measure(model, token_file, seed=3, lengths=[100, 128], depths=[0.5])[1] == first[1]
    for cell, other in zip(first, measure(model, token_file, seed=3, batch_size=3), strict=True):
        assert other.gain == pytest.approx(cell.gain, rel=1e-3, abs=1e-5)
        assert (other.accuracy, other.distance) == (cell.accuracy, cell.distance)


def test_gain_and_its_error_are_those_of_the_samples(token_file: TokenFile) -> None:
    class Counter(Copier):
        """Its logits grow with a number that each window has another of."""

        def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
            self.calls.append(input_ids)
            sums = (input_ids % 7).sum(1).float()
            logits = torch.arange(257.0)[None, None] * sums[:, None, None] * 1e-4
            return SimpleNamespace(logits=logits.expand(-1, logits_to_keep, -1))

    model = Counter(reach=0)
    (cell,) = measure(model, token_file, depths=[0.5], samples=5, batch_size=1)
    windows = torch.cat(model.calls)
    gains = []
    for found, missed in zip(windows[0::2], windows[1::2], strict=True):
        needle = LINE.search(bytes(found.tolist()).decode())
        assert needle
        labels = torch.tensor(list(needle[2][4:].encode()))
        per_window = [
            (torch.arange(257.0) * (row % 7).sum() * 1e-4).log_softmax(-1)[labels].mean()
            for row in (found, missed)
        ]
        gains.append((per_window[0] - per_window[1]).item())
    assert cell.gain == pytest.approx(np.mean(gains), rel=1e-3)
    assert cell.gain_error == pytest.approx(np.std(gains, ddof=1) / math.sqrt(5), rel=1e-3)


def test_tokens_may_be_longer_than_letters(tmp_path: Path) -> None:
    words = ["".join(random.Random(seed).choices(ascii_lowercase, k=12)) for seed in range(500)]
    tokenizer = train_bpe([TEXT * 3 + " ".join(words)], vocab_size=330)
    text = tokenizer.encode(TEXT * 60)
    with TokenFileWriter(tmp_path / "bpe", 330, "hash", "test") as writer:
        writer.add(np.array(text), 1)
    model = Copier(reach=300, match=2, vocab_size=330)
    (cell,) = measure(model, TokenFile.open(tmp_path / "bpe"), tokenizer=tokenizer, depths=[1.0], samples=19)
    assert {call.shape[1] for call in model.calls} == {128}
    assert cell.distance % 1 > 0  # not all values have as many tokens
    assert cell.accuracy > 0.9  # two tokens may have come before
    assert cell.gain > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "lengths must be a list or tuple with at least one entry, got []"),
        ({"lengths": 128}, "lengths must be a list or tuple with at least one entry, got 128"),
        ({"lengths": [128, 2.0]}, "every entry of lengths must be an integer >= 1, got 2.0"),
        ({"lengths": [200]}, "lengths must be at most 150, the model's learned positions, got 200"),
        (
            {"lengths": [40]},
            "lengths must be at least 48, the tokens of needle and question, got 40",
        ),
        ({"depths": []}, "depths must be a list or tuple with at least one entry, got []"),
        ({"depths": [0.5, 1.5]}, "every entry of depths must be a number in 0 … 1, got 1.5"),
        ({"depths": [float("nan")]}, "every entry of depths must be a number in 0 … 1, got nan"),
        ({"depths": [True]}, "every entry of depths must be a number in 0 … 1, got True"),
        ({"samples": 1}, "samples must be an integer >= 2, got 1"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(token_file: TokenFile, changes: dict[str, Any], message: str) -> None:
    model = Copier(300, position_embedding="learned", max_position_embeddings=150)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(model, token_file, **changes)
    assert model.calls == []


def test_the_shortest_window_is_taken(token_file: TokenFile) -> None:
    assert measure(Copier(300), token_file, lengths=[48])[0].accuracy == 1


def test_what_does_not_fit_together_is_refused(tmp_path: Path, token_file: TokenFile) -> None:
    with pytest.raises(ValueError, match="tokenizer has a vocabulary of 257, but the model one of 200"):
        measure(Copier(300, vocab_size=200), token_file)
    (tmp_path / "wide").mkdir()
    with pytest.raises(ValueError, match="token_file has a vocabulary of 300, but the model one of 257"):
        measure(Copier(300), write(tmp_path / "wide", TEXT, vocab_size=300))
    (tmp_path / "short").mkdir()
    with pytest.raises(
        ValueError, match="token_file must hold at least 81 tokens for windows of 128, got 66"
    ):
        measure(Copier(300), write(tmp_path / "short", TEXT))


def test_a_tokenizer_that_does_not_tell_letters_apart_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "[END]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    model, text = Copier(reach=300, vocab_size=3), np.ones(200, dtype=np.int64)
    options: dict[str, Any] = {"lengths": [64], "depths": [0.5], "samples": 2}
    for call in (measure_needle, check_needle):
        with pytest.raises(ValueError, match="tokenizer must encode random letters as tokens that tell them"):
            call(model, tokenizer, text, **options)
    assert not model.calls


def test_a_check_refuses_what_a_measurement_refuses(token_file: TokenFile) -> None:
    options: dict[str, Any] = {"depths": [0.5], "samples": 2}
    model = Copier(reach=300)
    check_needle(model, TOKENIZER, token_file, lengths=[128], **options)
    with pytest.raises(ValueError, match="lengths must be at least"):
        check_needle(model, TOKENIZER, token_file, lengths=[128, 10], **options)
    assert not model.calls
