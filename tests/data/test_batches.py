import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.data.conftest import WriteTokens

from longshort.data import Batch, Batches, TokenFile, validation_windows

quick = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def token_file(write_tokens: WriteTokens) -> TokenFile:
    """Every token's id is its position."""
    return write_tokens([1, 7, 2, 2, 30, 1, 1, 57, 400])


def documents_at(token_file: TokenFile, positions: torch.Tensor) -> torch.Tensor:
    """The document of each position, counted the slow way."""
    numbers = np.repeat(np.arange(token_file.documents), np.diff(token_file.document_offsets))
    return torch.from_numpy(numbers)[positions]


def assert_is_windows(batch: Batch, token_file: TokenFile, count: int, length: int) -> None:
    for tensor in batch:
        assert tensor.shape == (count, length)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    positions = batch.input_ids  # ids are positions in these files
    assert torch.equal(positions, positions[:, :1] + torch.arange(length))
    assert torch.equal(batch.labels, positions + 1)
    assert int(positions.min()) >= 0
    assert int(batch.labels.max()) < len(token_file)
    documents = documents_at(token_file, positions)
    assert torch.equal(batch.segment_ids, documents - documents[:, :1])


@quick
@given(
    length=st.integers(1, 500),
    size=st.integers(1, 5),
    step=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_batch_is_windows_with_shifted_labels_and_segments(
    token_file: TokenFile, length: int, size: int, step: int, seed: int
) -> None:
    batch = Batches(token_file, length, size, seed).batch(step)
    assert_is_windows(batch, token_file, size, length)


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


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_validation_windows_span_the_file_evenly(token_file: TokenFile, count: int) -> None:
    windows = validation_windows(token_file, 20, count)
    assert_is_windows(windows, token_file, count, 20)
    starts = windows.input_ids[:, 0]
    assert int(starts[0]) == 0
    if count > 1:
        assert int(windows.labels[-1, -1]) == len(token_file) - 1
        gaps = starts.diff()
        assert int(gaps.max() - gaps.min()) <= 1


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
        validation_windows(token_file, **arguments)
