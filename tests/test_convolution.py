"""`ShortConvolution`: plain maths, borders of segments, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from longshort.convolution import ShortConvolution


def make_convolution(kernel_size: int = 3) -> ShortConvolution:
    convolution = ShortConvolution(5, kernel_size)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(convolution.weight, generator=generator)
    return convolution


def make_input(length: int = 9) -> Tensor:
    return torch.randn(2, length, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("kernel_size", [2, 3, 12])
def test_equals_torch_s_depthwise_convolution(kernel_size: int, length: int) -> None:
    convolution, x = make_convolution(kernel_size), make_input(length)
    padded = nn.functional.pad(x.mT, (kernel_size - 1, 0))
    expected = nn.functional.conv1d(padded, convolution.weight.flip(-1)[:, None], groups=5).mT
    torch.testing.assert_close(convolution(x), expected)


def test_starts_as_the_identity() -> None:
    assert torch.equal(ShortConvolution(5, 4)(make_input()), make_input())


def test_segments_and_padding_are_not_crossed() -> None:
    convolution, x = make_convolution(4), make_input()
    segment_ids = torch.tensor([[-1, 3, 3, 3, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, -1, -1, -1]])
    out = convolution(x, segment_ids)
    for row, runs in ((0, [(1, 4), (4, 9)]), (1, [(0, 2), (2, 3), (3, 6)])):  # a run of equal ids ends too
        for first, last in runs:
            torch.testing.assert_close(out[row, first:last], convolution(x[row : row + 1, first:last])[0])


def test_computes_in_the_dtype_of_its_input() -> None:
    convolution = make_convolution()
    assert convolution(make_input().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(make_input().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "channels must be an integer >= 1, got 0"),
        ((5, 1), "kernel_size must be an integer >= 2, got 1"),
        ((5, True), "kernel_size must be an integer >= 2, got True"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortConvolution(*arguments)


def test_shows_its_size() -> None:
    assert repr(ShortConvolution(5, 3)) == "ShortConvolution(5, kernel_size=3)"
