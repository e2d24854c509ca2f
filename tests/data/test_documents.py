import re
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from longshort.data import DocumentStart, begins_with_end_of_text, document_segments

A_B_END_C_D_END = np.array([0, 3, 6])


def test_an_end_of_text_token_begins_the_next_document_or_ends_its_own() -> None:
    positions = np.arange(-1, 6)  # the first is an end-of-text token before the file
    at = document_segments(A_B_END_C_D_END, positions, "at-end-of-text")
    after = document_segments(A_B_END_C_D_END, positions, "after-end-of-text")
    assert at.tolist() == [1, 1, 1, 2, 2, 2, 3]
    assert after.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert begins_with_end_of_text("at-end-of-text")
    assert not begins_with_end_of_text("after-end-of-text")


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    document_start=st.sampled_from(get_args(DocumentStart)),
)
def test_segments_as_counted_by_hand(lengths: list[int], document_start: DocumentStart) -> None:
    expected = []
    for segment, length in enumerate(lengths, start=1):
        *text, end = [segment] * length
        expected += [*text, end + (document_start == "at-end-of-text")]
    offsets = np.cumsum([0, *lengths])
    positions = np.arange(sum(lengths)).reshape(1, -1)
    assert document_segments(offsets, positions, document_start).tolist() == [expected]


@pytest.mark.parametrize("given", ["", "at", None, True])
def test_another_start_is_refused(given: Any) -> None:
    message = re.escape(f"must be one of {', '.join(get_args(DocumentStart))}, got {given!r}")
    for call in (
        lambda: begins_with_end_of_text(given),
        lambda: document_segments(A_B_END_C_D_END, np.arange(2), given),
    ):
        with pytest.raises(ValueError, match=message):
            call()
