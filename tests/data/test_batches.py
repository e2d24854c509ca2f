import re
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.data.conftest import WriteTokens

from longshort.data import Batch, Batches, DocumentStart, TokenFile, copying_windows, validation_windows

quick = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def token_file(write_tokens: WriteTokens) -> TokenFile:
    """Every token's id is its position."""
    return write_tokens([1, 7, 2, 2, 30, 1, 1, 57, 400])


def documents_at(token_file: TokenFile, positions: torch.Tensor, start: DocumentStart) -> torch.Tensor:
    """The document of each position, counted the slow way."""
    numbers = np.repeat(np.arange(token_file.documents), np.diff(token_file.document_offsets))
    if start == "at-end-of-text":  # what ends a document begins the next
        numbers = np.append(numbers[1:], token_file.documents)
    return torch.from_numpy(numbers)[positions]


def assert_is_windows(
    batch: Batch, token_file: TokenFile, count: int, length: int, start: DocumentStart = "at-end-of-text"
) -> None:
    for tensor in batch:
        assert tensor.shape == (count, length)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    positions = batch.input_ids  # ids are positions in these files
    assert torch.equal(positions, positions[:, :1] + torch.arange(length))
    assert torch.equal(batch.labels, positions + 1)
    assert int(positions.min()) >= 0
    assert int(batch.labels.max()) < len(token_file)
    documents = documents_at(token_file, positions, start)
    assert torch.equal(batch.segment_ids, documents - documents[:, :1])


@quick
@given(
    length=st.integers(1, 500),
    size=st.integers(1, 5),
    step=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
    start=st.sampled_from(get_args(DocumentStart)),
)
def test_a_batch_is_windows_with_shifted_labels_and_segments(
    token_file: TokenFile, length: int, size: int, step: int, seed: int, start: DocumentStart
) -> None:
    batch = Batches(token_file, length, size, seed, document_start=start).batch(step)
    assert_is_windows(batch, token_file, size, length, start)


@quick
@given(step=st.integers(0, 10**9), seed=st.integers(0, 10**9))
def test_a_batch_is_a_pure_function_of_seed_and_step(token_file: TokenFile, step: int, seed: int) -> None:
    batches = Batches(token_file, 16, 4, seed)
    first = batches.batch(step)
    batches.batch(step + 1)
    np.random.default_rng(0).random()
    torch.rand(1)
    for again in (batches.batch(step), Batches(TokenFile.open(token_file.path), 16, 4, seed).batch(step)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@quick
@given(part=st.integers(1, 4), world_size=st.integers(1, 6), step=st.integers(0, 1000))
def test_the_ranks_parts_make_up_the_global_batch(
    token_file: TokenFile, part: int, world_size: int, step: int
) -> None:
    batches = Batches(token_file, 8, part * world_size, seed=1)
    parts = [batches.batch(step, rank, world_size) for rank in range(world_size)]
    whole = Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    assert all(len(p.input_ids) == part for p in parts)
    assert all(torch.equal(a, b) for a, b in zip(whole, batches.batch(step), strict=True))


def test_the_draws_are_these_forever(write_tokens: WriteTokens) -> None:
    # A run that is resumed under another version of numpy or of ours must go on with the same batches.
    batch = Batches(write_tokens([50_000]), 4, 4, seed=3).batch(7)
    assert batch.input_ids[:, 0].tolist() == [10520, 1124, 36723, 18707]


def test_seeds_and_steps_differ(token_file: TokenFile) -> None:
    starts = {
        (seed, step): tuple(Batches(token_file, 4, 8, seed).batch(step).input_ids[:, 0].tolist())
        for seed in range(6)
        for step in range(6)
    }
    assert len(set(starts.values())) == 36


def test_every_start_is_drawn_equally_often(write_tokens: WriteTokens) -> None:
    token_file = write_tokens([20])
    batches = Batches(token_file, 10, 1000, seed=0)
    starts = torch.cat([batches.batch(step).input_ids[:, 0] for step in range(10)])
    counts = torch.bincount(starts, minlength=10).double()
    assert len(counts) == 10
    # χ² with 9 degrees of freedom: 27.9 is passed by chance once in a thousand.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 27.9


def test_ids_beyond_16_bits(write_tokens: WriteTokens) -> None:
    token_file = write_tokens([[2**32 - 1, 70_000, 5]], vocab_size=2**32)
    batch = Batches(token_file, 2, 1, seed=0).batch(0)
    assert batch.input_ids.tolist() == [[2**32 - 1, 70_000]]
    assert batch.labels.tolist() == [[70_000, 5]]


@pytest.mark.parametrize("start", get_args(DocumentStart))
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_validation_windows_span_the_file_evenly(
    token_file: TokenFile, count: int, start: DocumentStart
) -> None:
    windows = validation_windows(token_file, 20, count, document_start=start)
    assert_is_windows(windows, token_file, count, 20, start)
    starts = windows.input_ids[:, 0]
    assert int(starts[0]) == 0
    if count > 1:
        assert int(windows.labels[-1, -1]) == len(token_file) - 1
        gaps = starts.diff()
        assert int(gaps.max() - gaps.min()) <= 1


def text_order(batch: Batch) -> torch.Tensor:
    """All tokens of each window, the last label among them."""
    return torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)


@quick
@given(length=st.integers(1, 300), step=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_permuted_windows_are_those_of_the_text_in_one_order(
    token_file: TokenFile, length: int, step: int, seed: int
) -> None:
    text = Batches(token_file, length, 3, seed).batch(step)
    permuted = Batches(token_file, length, 3, seed, token_order="permuted").batch(step)
    validation = validation_windows(token_file, length, 4, token_order="permuted")
    windows, others = text_order(permuted), text_order(validation)
    order = windows[0] - windows[0].min()  # ids are positions in these files
    assert sorted(order.tolist()) == list(range(length + 1))
    assert torch.equal(windows, text_order(text)[:, order])
    assert torch.equal(others, text_order(validation_windows(token_file, length, 4))[:, order])
    for batch in (permuted, validation):
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        assert not batch.segment_ids.any()


def test_a_permutation_leaves_no_neighbours(token_file: TokenFile) -> None:
    window = text_order(Batches(token_file, 400, 1, 0, token_order="permuted").batch(0))[0]
    assert int((window.diff() == 1).sum()) <= 5  # 1 is expected of a random order
    assert window.diff().abs().double().mean() == pytest.approx(401 / 3, rel=0.1)


def test_the_permutation_is_this_forever(write_tokens: WriteTokens) -> None:
    batch = Batches(write_tokens([8]), 7, 1, 0, token_order="permuted").batch(0)
    assert text_order(batch).tolist() == [[7, 2, 3, 1, 6, 4, 5, 0]]


@quick
@given(
    length=st.integers(2, 300), pieces=st.integers(1, 20), step=st.integers(0, 1000), seed=st.integers(0, 99)
)
def test_interleaved_windows_are_woven_of_pieces_of_text(
    token_file: TokenFile, length: int, pieces: int, step: int, seed: int
) -> None:
    pieces = min(pieces, length)
    order: dict[str, Any] = {"token_order": "interleaved", "interleave": pieces}
    batches = Batches(token_file, length, 4, seed, **order)
    for batch in (batches.batch(step), validation_windows(token_file, length, 4, **order)):
        windows = text_order(batch)
        assert windows.shape == (4, length + 1)
        # ids are positions: `pieces` tokens on, the text goes on by one token
        assert torch.equal(windows[:, pieces:], windows[:, :-pieces] + 1)
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        assert not batch.segment_ids.any()
        assert all(tensor.is_contiguous() and tensor.dtype == torch.int64 for tensor in batch)
    halves = [batches.batch(step, rank, 2) for rank in range(2)]
    whole = Batch(*(torch.cat(tensors) for tensors in zip(*halves, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, batches.batch(step), strict=True))


def test_interleaved_pieces_come_from_independent_places(write_tokens: WriteTokens) -> None:
    token_file = write_tokens([20])
    batches = Batches(token_file, 10, 1000, seed=0, token_order="interleaved", interleave=2)
    first = torch.cat([batches.batch(step).input_ids[:, :2] for step in range(20)])
    pairs = torch.bincount(first[:, 0] * 15 + first[:, 1], minlength=225).double()
    assert len(pairs) == 225  # pieces of 6 tokens begin at 15 places
    # χ² with 224 degrees of freedom: 295 is passed by chance once in a thousand.
    assert float(((pairs - 20_000 / 225) ** 2 / (20_000 / 225)).sum()) < 295


def test_interleaved_validation_pieces_span_the_file_evenly(token_file: TokenFile) -> None:
    windows = validation_windows(token_file, 20, 5, token_order="interleaved", interleave=4)
    starts = windows.input_ids[:, :4]
    in_order = starts.T.flatten()
    assert int(in_order[0]) == 0
    assert int(in_order[-1]) == len(token_file) - 6  # pieces of 6 tokens
    gaps = in_order.diff()
    assert int(gaps.max() - gaps.min()) <= 1
    assert (
        int(starts.diff(dim=1).min()) >= (len(token_file) - 6) // 4 - 1
    )  # those of one window are far apart


def test_one_piece_is_the_text(token_file: TokenFile) -> None:
    text = Batches(token_file, 30, 4, 1).batch(2)
    woven = Batches(token_file, 30, 4, 1, token_order="interleaved", interleave=1).batch(2)
    assert torch.equal(text_order(woven), text_order(text))


def test_a_file_of_one_window(write_tokens: WriteTokens) -> None:
    token_file = write_tokens([5, 4])
    assert Batches(token_file, 8, 2, seed=0).batch(0).input_ids.tolist() == [list(range(8))] * 2
    assert validation_windows(token_file, 8, 2).labels.tolist() == [list(range(1, 9))] * 2
    for make in (lambda: Batches(token_file, 9, 1, seed=0), lambda: validation_windows(token_file, 9, 1)):
        with pytest.raises(ValueError, match="has 9 tokens; sequence_length 9 needs windows of 10"):
            make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be an integer in 1 …"),
        ({"sequence_length": 2.0}, "sequence_length must be an integer in 1 … 18446744073709551615, got 2.0"),
        ({"batch_size": 0}, "batch_size must be an integer in 1 …"),
        ({"batch_size": True}, "batch_size must be an integer in 1 …"),
        ({"seed": -1}, "seed must be an integer in 0 …"),
        ({"seed": 2**64}, "seed must be an integer in 0 …"),
        ({"token_order": "random"}, "token_order must be one of text, permuted, interleaved, got 'random'"),
        ({"token_order": None}, "token_order must be one of text, permuted, interleaved, got None"),
        ({"document_start": "E"}, "document_start must be one of at-end-of-text, after-end-of-text, got 'E'"),
        ({"token_order": "interleaved"}, "interleave must be an integer in 1 … 4, got 16"),
        ({"token_order": "interleaved", "interleave": 0}, "interleave must be an integer in 1 … 4, got 0"),
        (
            {"sequence_length": 2000, "token_order": "interleaved", "interleave": 2},
            "has 501 tokens; sequence_length 2000 needs pieces of 1001",
        ),
    ],
)
def test_bad_batches_are_refused(token_file: TokenFile, arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"sequence_length": 4, "batch_size": 4, "seed": 0}
    with pytest.raises(ValueError, match=re.escape(message)):
        Batches(token_file, **good | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be an integer in 0 …"),
        ({"step": 1.5}, "step must be an integer in 0 …"),
        ({"step": 0, "rank": 2, "world_size": 2}, "rank must be an integer in 0 … 1, got 2"),
        ({"step": 0, "rank": -1}, "rank must be an integer in 0 … 0, got -1"),
        ({"step": 0, "world_size": 0}, "world_size must be an integer in 1 …"),
        ({"step": 0, "world_size": 3}, "batch_size 4 must be a multiple of world_size 3"),
    ],
)
def test_a_bad_part_is_refused(token_file: TokenFile, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Batches(token_file, 4, 4, seed=0).batch(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"sequence_length": 0, "count": 1}, {"sequence_length": 1, "count": 0}]
)
def test_bad_validation_windows_are_refused(token_file: TokenFile, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be an integer in 1 …"):
        validation_windows(token_file, **arguments)  # pyright: ignore[reportArgumentType]


def test_copying_windows_repeat_their_first_half(token_file: TokenFile) -> None:
    batch = copying_windows(token_file, 21, count=3)
    assert batch.input_ids.shape == batch.labels.shape == (3, 20)
    first, second = batch.input_ids.split(10, dim=1)
    assert torch.equal(first, second)
    assert int(first.max()) < len(token_file) and len(first.unique()) > 20
    counted = batch.labels != -100
    assert counted.sum(1).tolist() == [10] * 3  # from the last token of the first half on
    assert torch.equal(batch.labels[counted], batch.input_ids.roll(-1, 1)[counted])
    assert torch.equal(copying_windows(token_file, 21, 3).input_ids, batch.input_ids)
    assert not torch.equal(copying_windows(token_file, 21, 3, seed=1).input_ids, batch.input_ids)


@pytest.mark.parametrize("length", [4, 5, 400])
def test_the_tokens_of_the_second_half_are_the_labels(token_file: TokenFile, length: int) -> None:
    labels = copying_windows(token_file, length, 2).labels
    half = length // 2
    assert (labels[:, : half - 1] == -100).all() and (labels[:, half - 1 : -1] >= 0).all()
    assert (labels[:, -1] == -100).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sequence_length": 3}, "sequence_length"), ({"count": 0}, "count"), ({"seed": -1}, "seed")],
    ids=str,
)
def test_bad_copying_windows_are_refused(token_file: TokenFile, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copying_windows(token_file, **{"sequence_length": 8, "count": 1, **changes})
