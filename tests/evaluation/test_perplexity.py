import math
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longshort.data import Batches, DocumentStart
from longshort.data.token_files import TokenFile, TokenFileWriter
from longshort.evaluation import evaluate_documents
from longshort.evaluation.perplexity import split_into_windows
from longshort.model import LongShortConfig, LongShortForCausalLM

VOCAB = 5
END = 4


class Fake(nn.Module):
    """A causal model given by a function of (input_ids, position); it keeps what it was called with."""

    def __init__(self, logits, vocab_size=VOCAB, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=vocab_size, **config)
        self.function = logits
        self.calls = []

    def forward(self, input_ids, use_cache, segment_ids=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((input_ids, segment_ids))
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(logits=self.function(input_ids, positions))


def token_file(folder, documents, vocab_size=VOCAB, text_bytes=None):
    with TokenFileWriter(folder / "validation", vocab_size, "hash", "test") as writer:
        for index, document in enumerate(documents):
            ids = np.array([*document, END])
            writer.add(ids, len(document) if text_bytes is None else text_bytes[index])
    return TokenFile.open(folder / "validation")


def random_documents(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, END, length).tolist() for length in lengths]


@given(length=st.integers(1, 300), context=st.integers(1, 80))
def test_windows_score_each_token_once_with_half_a_context(length, context):
    scored = []
    for number, window in enumerate(split_into_windows(length, context)):
        assert 0 <= window.start <= window.scored < window.end <= length
        assert window.end - window.start <= context
        scored += range(window.scored, window.end)
        tokens_of_context = window.scored - window.start + 1
        if number:
            assert tokens_of_context >= context / 2
    assert scored == list(range(length))


def test_a_document_that_fits_is_one_window():
    assert list(split_into_windows(8, 8)) == [(0, 8, 0)]
    assert list(split_into_windows(9, 8)) == [(0, 8, 0), (4, 9, 8)]


def test_a_uniform_model_scores_ln_v(tmp_path):
    documents = random_documents([0, 3, 17, 40])
    model = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    model.train()
    result = evaluate_documents(model, token_file(tmp_path, documents), context_length=8)
    assert model.training
    assert result.tokens == 60 + 4
    assert result.bytes == 60
    assert result.documents == 4
    assert result.context_length == 8
    assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(64 * math.log2(VOCAB) / 60, rel=1e-6)
    assert sum(position.tokens for position in result.loss_by_position) == 64


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    context=st.integers(1, 24),
    batch_size=st.integers(1, 7),
)
def test_a_bigram_model_scores_as_counted_by_hand(tmp_path_factory, lengths, context, batch_size):
    """Its loss does not depend on the windows, so any token missed, doubled or shifted would show."""
    documents = random_documents(lengths)
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
    result = evaluate_documents(
        Fake(lambda ids, _: table[ids]),
        token_file(tmp_path_factory.mktemp("bigram"), documents),
        context_length=context,
        batch_size=batch_size,
    )
    log_p = table.double().log_softmax(-1)
    nats = 0.0
    for document in documents:
        sequence = [END, *document, END]
        nats -= sum(float(log_p[a, b]) for a, b in pairwise(sequence))
    tokens = sum(lengths) + len(lengths)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(lengths), rel=1e-5)


def test_loss_by_position_is_the_models(tmp_path):
    """Documents of zeros; the model gives 0 the probability (p + 1) / 65 at position p of the window."""

    def logits(ids, positions):
        likely = (positions + 1) / 65
        rest = ((1 - likely) / (VOCAB - 1)).log()[..., None].expand(*ids.shape, VOCAB).clone()
        rest[..., 0] = likely.log()
        return rest

    result = evaluate_documents(
        Fake(logits), token_file(tmp_path, [[0] * 500, [0] * 20]), context_length=64, batch_size=3
    )
    losses, counts = np.zeros(64), np.zeros(64)
    for length in (501, 21):
        for window in split_into_windows(length, 64):
            for index in range(window.scored, window.end):
                position = index - window.start
                p = (position + 1) / 65
                losses[position] -= math.log(p if index < length - 1 else (1 - p) / (VOCAB - 1))
                counts[position] += 1
    assert result.loss == pytest.approx(losses.sum() / counts.sum(), rel=1e-5)
    covered = []
    for position in result.loss_by_position:
        inside = slice(position.first, position.last + 1)
        covered += range(position.first, position.last + 1)
        assert position.tokens == counts[inside].sum()
        assert position.loss == pytest.approx(losses[inside].sum() / counts[inside].sum(), rel=1e-5)
    assert covered == list(range(64))
    assert result.loss_by_position[0].first == result.loss_by_position[0].last == 0


def test_positions_never_reached_are_left_out(tmp_path):
    uniform = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    result = evaluate_documents(uniform, token_file(tmp_path, [[1, 2, 3]]), context_length=1000)
    assert max(position.first for position in result.loss_by_position) <= 3
    assert sum(position.tokens for position in result.loss_by_position) == 4


@pytest.mark.parametrize(
    ("limits", "documents", "tokens", "text_bytes"),
    [
        ({"max_documents": 2}, 2, 30, 280),
        ({"max_documents": 9}, 3, 60, 570),
        ({"max_tokens": 30}, 2, 30, 280),
        ({"max_tokens": 59}, 2, 30, 280),
        ({"max_tokens": 1}, 1, 10, 90),
        ({"max_tokens": 60, "max_documents": 1}, 1, 10, 90),
    ],
    ids=str,
)
def test_limits_take_whole_documents(tmp_path, limits, documents, tokens, text_bytes):
    uniform = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    file = token_file(tmp_path, random_documents([9, 19, 29]), text_bytes=[90, 190, 290])
    result = evaluate_documents(uniform, file, context_length=8, **limits)
    assert (result.documents, result.tokens, result.bytes) == (documents, tokens, text_bytes)


def test_progress_ends_at_the_total(tmp_path):
    uniform = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    seen = []
    evaluate_documents(
        uniform, token_file(tmp_path, random_documents([30, 50])), context_length=8, batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (82, 82)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("document_start", "expected"),
    [
        ("at-end-of-text", [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1]]),
        ("after-end-of-text", [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1]]),
    ],
)
def test_separate_documents_begin_where_those_of_the_training_did(tmp_path, document_start, expected):
    model = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    evaluate_documents(
        model,
        token_file(tmp_path, random_documents([6])),
        context_length=4,
        batch_size=4,
        separate_documents=True,
        document_start=document_start,
    )
    inputs, segments = model.calls[0]
    assert inputs[:, 0].tolist()[0] == END
    assert [row[: len(mine)] for row, mine in zip(segments.tolist(), expected, strict=True)] == expected


def test_a_real_model_scores_the_same_at_every_batch_size(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    file = token_file(tmp_path, random_documents([3, 33, 12, 50]))
    alone = evaluate_documents(model, file, context_length=16, batch_size=1)
    together = evaluate_documents(model, file, context_length=16, batch_size=50)
    assert abs(alone.loss - math.log(VOCAB)) > 0.01
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)
    assert evaluate_documents(model, file, context_length=4).loss != pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("document_start", get_args(DocumentStart))
def test_evaluation_sees_what_training_on_separate_documents_saw(tmp_path, document_start):
    """In one window over the whole file every document has the loss that it is evaluated with, but for its
    first token where that saw the document before."""
    torch.manual_seed(0)
    config = LongShortConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, local_window=3,
        max_position_embeddings=64, position_embedding="none", initializer_range=1.0,
    )  # fmt: skip
    model = LongShortForCausalLM(config).eval()
    file = token_file(tmp_path, random_documents([9, 1, 3, 14, 6]))
    cut = {"document_start": document_start}
    window = Batches(file, len(file) - 1, 1, seed=0, **cut).batch(0)
    with torch.no_grad():
        logits = model(window.input_ids, segment_ids=window.segment_ids).logits
        trained = F.cross_entropy(logits[0], window.labels[0], reduction="none")
    for document in range(1, file.documents):  # what is before the first, no window holds
        begin, end = file.document_offsets[document : document + 2]
        alone = tmp_path / f"{document}"
        alone.mkdir()
        text = file.tokens[begin : end - 1]
        one = token_file(alone, [text], text_bytes=[max(1, len(text))])
        evaluated = evaluate_documents(model, one, context_length=64, separate_documents=True, **cut)
        first = evaluated.loss_by_position[0].loss
        in_training, *others = trained[begin - 1 : end - 1].tolist()
        assert evaluated.loss * evaluated.tokens - first == pytest.approx(sum(others), rel=1e-4, abs=1e-4)
        is_alike = first == pytest.approx(in_training, rel=1e-4)
        assert is_alike == (document_start == "at-end-of-text")


@pytest.mark.parametrize("document_start", get_args(DocumentStart))
def test_separate_documents_see_the_end_of_text_token_where_they_begin_at_it(tmp_path, document_start):
    """Where they do not, all tokens but the document's first are predicted alike whatever is at its place."""
    torch.manual_seed(0)
    config = LongShortConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, local_window=3,
        max_position_embeddings=16, initializer_range=1.0,
    )  # fmt: skip
    model = LongShortForCausalLM(config)
    file = token_file(tmp_path, random_documents([40]))
    losses = []
    for separate in (True, False):
        for scale in (1.0, -3.0):
            with torch.no_grad():
                model.model.embed_tokens.weight[END] *= scale
            result = evaluate_documents(
                model, file, context_length=16, separate_documents=separate, document_start=document_start
            )
            first, *others = result.loss_by_position
            assert (first.first, first.last, first.tokens) == (0, 0, 1)
            losses.append([position.loss for position in others])
    assert (losses[0] == losses[1]) == (document_start == "after-end-of-text")
    assert losses[2] != losses[3]


def test_a_diverged_model_is_reported_as_it_is(tmp_path):
    broken = Fake(lambda ids, _: torch.full((*ids.shape, VOCAB), math.nan))
    result = evaluate_documents(broken, token_file(tmp_path, [[1, 2]]), context_length=8)
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    another = tmp_path / "another"
    another.mkdir()
    sure = torch.eye(VOCAB)[1] * 1e4
    wrong = Fake(lambda ids, _: sure.expand(*ids.shape, VOCAB))
    assert evaluate_documents(wrong, token_file(another, [[0, 0]]), context_length=8).perplexity == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 0}, "context_length"),
        ({"context_length": True}, "context_length"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_documents": 0}, "max_documents"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"document_start": "E"}, "document_start must be one of at-end-of-text, after-end-of-text, got 'E'"),
        ({"context_length": 33}, "at most 32, the model's learned positions, got 33"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_numbers_are_refused(tmp_path, changes, message):
    model = Fake(
        lambda ids, _: torch.zeros(*ids.shape, VOCAB),
        position_embedding="learned",
        max_position_embeddings=32,
    )
    with pytest.raises(ValueError, match=message):
        evaluate_documents(model, token_file(tmp_path, [[1]]), **{"context_length": 8, **changes})
    assert not model.calls


def test_another_tokenizers_file_is_refused(tmp_path):
    model = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate_documents(model, token_file(tmp_path, [[1]], vocab_size=VOCAB + 1), context_length=8)


def test_documents_without_text_are_refused(tmp_path):
    model = Fake(lambda ids, _: torch.zeros(*ids.shape, VOCAB))
    with pytest.raises(ValueError, match="must hold text"):
        evaluate_documents(model, token_file(tmp_path, [[], []]), context_length=8)
