"""From attention masks and position ids to segment ids."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from longshort.huggingface import segment_ids_from

CPU = torch.device("cpu")


def segments(mask: Any, positions: Any = None, kv_len: int | None = None) -> list[list[int]] | None:
    tensors = [None if given is None else torch.tensor(given) for given in (mask, positions)]
    mask, positions = tensors
    batch = max(len(tensor) for tensor in tensors if tensor is not None)
    lengths = [tensor.shape[1] for tensor in tensors if tensor is not None]
    kv_len = kv_len or lengths[0]
    q_len = kv_len if positions is None else positions.shape[1]
    result = segment_ids_from(mask, positions, batch, q_len, kv_len, CPU)
    if result is None:
        return None
    assert result.dtype == torch.int64 and result.shape == (batch, kv_len)
    return result.tolist()


def test_nothing_given_means_nothing_padded() -> None:
    assert segment_ids_from(None, None, 2, 3, 5, CPU) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_padding_on_either_side(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).to(dtype)
    result = segment_ids_from(mask, None, 2, 4, 4, CPU)
    assert result is not None and result.tolist() == [[-1, -1, 0, 0], [0, 0, 0, -1]]


def test_a_mask_of_ones_is_no_padding() -> None:
    assert segments([[1, 1, 1]]) is None
    assert segments([[True, True]]) is None


def test_ordinary_positions_are_one_sequence() -> None:
    assert segments(None, [[0, 1, 2, 3]]) is None
    assert segments(None, [[7, 8, 9], [0, 1, 2]]) is None
    assert segments(None, [[5]]) is None


def test_positions_that_restart_are_packed_sequences() -> None:
    assert segments(None, [[0, 1, 2, 0, 1, 0]]) == [[0, 0, 0, 1, 1, 2]]
    assert segments(None, [[0, 1, 2, 3], [0, 1, 0, 1]]) == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert segments(None, [[3, 4, 2, 3]]) == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([0, 1, 2, 100, 101], id="position-skip-training"),
        pytest.param([0, 2, 4, 6, 8], id="step-2"),
        pytest.param([5, 5, 5, 5, 5], id="constant"),
        pytest.param([0, 1, 1, 1, 2], id="tokens-that-share-a-position"),
        pytest.param([-3, -2, 7, 8, 8], id="negative-at-first"),
    ],
)
def test_positions_that_do_not_fall_are_one_sequence(positions: list[int]) -> None:
    assert segments(None, [positions]) is None
    assert segments([[0, 1, 1, 1, 1]], [[9, *positions[1:]]]) == [[-1, 0, 0, 0, 0]]


@given(st.data())
def test_a_document_begins_where_a_visible_position_falls(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 9))
    positions = data.draw(st.lists(st.integers(-2, 5), min_size=length, max_size=length))
    mask = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=length, max_size=length))
    expected, document, before, last = [], 0, None, 0
    for position, is_visible in zip(positions, mask or [1] * length, strict=True):
        if is_visible:
            document += before is not None and (position < min(before, last) or position == 0)
            before = position
        expected.append(document if is_visible else -1)
        last = position
    found = segments(None if mask is None else [mask], [positions])
    assert (found or [[0] * length]) == [expected]


def test_one_row_of_positions_holds_for_all_sequences() -> None:
    assert segments([[1, 1, 1, 1], [1, 1, 1, 0]], [[0, 1, 0, 1]]) == [[0, 0, 1, 1], [0, 0, 1, -1]]
    result = segment_ids_from(None, torch.tensor([[0, 0]]), 3, 2, 2, CPU)
    assert result is not None and result.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("fill", [0, 1])
def test_positions_as_generate_makes_them_are_not_packed(fill: int) -> None:
    mask = [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]]
    positions = (torch.tensor(mask).cumsum(-1) - 1).masked_fill(torch.tensor(mask) == 0, fill)
    expected = [[-1, -1, -1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, -1, 0, 0, -1]]
    assert segments(mask, positions.tolist()) == expected


def test_generation_continues_after_padding_on_the_right() -> None:
    mask = [[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    positions = [[0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert segments(mask, positions) == [[0, 0, 0, -1, -1, 0, 0], [0] * 7]
    # a new sequence
    assert segments(mask[:1], [[0, 1, 2, 0, 0, 0, 1]]) == [[0, 0, 0, -1, -1, 1, 1]]


def test_positions_that_count_padding_too_are_not_packed() -> None:
    mask = [[0, 0, 1, 1, 1], [1, 0, 1, 1, 1]]
    assert segments(mask, [[0, 1, 2, 3, 4]]) == [[-1, -1, 0, 0, 0], [0, -1, 0, 0, 0]]


def test_packed_and_padded() -> None:
    assert segments([[0, 1, 1, 1, 1, 0]], [[0, 0, 1, 0, 1, 0]]) == [[-1, 0, 0, 1, 1, -1]]
    assert segments([[1, 1, 1, 1]], [[0, 1, 0, 1]]) == [[0, 0, 1, 1]]


def test_cached_keys_are_told_by_the_mask_alone() -> None:
    mask = [[0, 1, 1, 1, 1]]
    assert segments(mask, [[3]], kv_len=5) == [[-1, 0, 0, 0, 0]]
    assert segments(mask, [[0, 0]], kv_len=5) == [[-1, 0, 0, 0, 0]]
    assert segments(None, [[9, 3]], kv_len=5) is None


@given(
    lengths=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    with_mask=st.booleans(),
)
def test_packed_rows_between_padding_keep_their_sequences(
    lengths: list[list[int]], left: int, right: int, with_mask: bool
) -> None:
    """Each row packs some sequences; rows are padded to one length."""
    if not with_mask:
        left = right = 0
        lengths = lengths[:1]
    longest = max(sum(row) for row in lengths)
    mask, positions, owners = [], [], []
    for row in lengths:
        tail = right + longest - sum(row)
        mask.append([0] * left + [1] * sum(row) + [0] * tail)
        positions.append([0] * left + [p for n in row for p in range(n)] + [0] * tail)
        owners.append([None] * left + [i for i, n in enumerate(row) for _ in range(n)] + [None] * tail)
    ids = segments(mask if with_mask else None, positions)
    if ids is None:
        assert all(len(row) == 1 for row in lengths) and left == right == 0
        return
    for row_ids, row_owners in zip(ids, owners, strict=True):
        for i, a in zip(row_ids, row_owners, strict=True):
            assert (i == -1) == (a is None)
            for j, b in zip(row_ids, row_owners, strict=True):
                if a is not None and b is not None:
                    assert (i == j) == (a == b)


def test_under_compile_nothing_is_looked_at() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        return segment_ids_from(mask, positions, 2, 4, 4, CPU)

    ones = torch.ones(2, 4, dtype=torch.int64)
    arange = torch.arange(4)[None]
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    jumping = torch.tensor([[0, 1, 7, 8], [4, 5, 2, 2]])
    assert compiled(None, None) is None
    for mask, positions in ((ones, None), (None, arange), (ones, arange)):
        result = compiled(mask, positions)
        assert result is not None and result.tolist() == [[0] * 4] * 2
    for mask, positions in (
        (padded, None),
        (None, packed),
        (padded, arange),
        (ones, packed),
        (ones, jumping),
    ):
        result, eager = compiled(mask, positions), segment_ids_from(mask, positions, 2, 4, 4, CPU)
        assert result is not None and eager is not None and torch.equal(result, eager)


@pytest.mark.parametrize(
    ("error", "mask", "positions", "message"),
    [
        (TypeError, [[1, 1]], None, "attention_mask must be a torch.Tensor, got list"),
        (TypeError, {"full": torch.ones(2, 4)}, None, "attention_mask must be a torch.Tensor, got dict"),
        (
            ValueError,
            torch.ones(2, 1, 4, 4),
            None,
            r"\(2, 1, 4, 4\); a mask per query and key cannot be used",
        ),
        (ValueError, torch.ones(2, 3), None, r"\(batch, kv_len\) = \(2, 4\), got shape \(2, 3\).*cached"),
        (ValueError, torch.ones(4), None, r"got shape \(4,\)"),
        (ValueError, torch.tensor([[0, 1, 2, 3]] * 2), None, "attention_mask must hold 0 and 1 only.*2"),
        (ValueError, torch.tensor([[0.0, -1e9, 1, 1]] * 2), None, "attention_mask must hold 0 and 1 only"),
        (TypeError, None, [[0, 1]], "position_ids must be a torch.Tensor, got list"),
        (ValueError, None, torch.zeros(2, 4), "position_ids must have an integer dtype, got torch.float32"),
        (ValueError, None, torch.zeros(2, 3).long(), r"position_ids must be .*got shape \(2, 3\)"),
        (ValueError, None, torch.zeros(3, 2, 4).long(), r"position_ids must be .*got shape \(3, 2, 4\)"),
    ],
)
def test_bad_masks_and_positions_are_named(
    error: type[Exception], mask: Any, positions: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        segment_ids_from(mask, positions, 2, 4, 4, CPU)
