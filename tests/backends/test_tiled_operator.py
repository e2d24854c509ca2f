"""The operator behind `blockwise`: registration, tiling in several parts, and memory."""

import subprocess
import sys

import pytest
import torch
from tests.attention_cases import computed, random_case

from longshort.backends import tiles


def operator_arguments(with_values: bool, with_stats: bool, requires_grad: bool = True):
    q = torch.randn(2, 4, 9, 8, requires_grad=requires_grad)
    k, v = (torch.randn(2, 2, 12, 8, requires_grad=requires_grad) for _ in range(2))
    ids = torch.randint(-1, 2, (2, 12))
    return (q, k, v if with_values else None, torch.rand(4), ids, 3, 2, True, 0.3, 5.0, False, torch.float32,
            with_stats)  # fmt: skip


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("with_stats", [True, False])
def test_opcheck(with_values: bool, with_stats: bool):
    torch.library.opcheck(
        torch.ops.longshort.tiled_attention.default, operator_arguments(with_values, with_stats)
    )


@pytest.mark.parametrize("with_values", [True, False])
def test_opcheck_of_the_backward_pass(with_values: bool):
    q, k, v, slopes, ids, *options = operator_arguments(with_values, False, requires_grad=False)
    out, row_maxima, log_sums, _, _ = torch.ops.longshort.tiled_attention(q, k, v, slopes, ids, *options)
    grad_out = torch.randn_like(out) if with_values else None
    saved = (q, k, v, slopes, ids, None, row_maxima, log_sums)
    gradients = (grad_out, torch.randn_like(log_sums))
    torch.library.opcheck(
        torch.ops.longshort.tiled_attention_backward.default, (*saved, *gradients, *options[:5])
    )


@pytest.mark.parametrize("tile_scores", [1, 300, 4000])
def test_the_size_of_a_tile_does_not_matter(tile_scores: int, monkeypatch):
    """Parts of batch and heads, one block or many per tile: the same numbers."""
    cases = [random_case(seed, max_length=150) for seed in range(5000, 5030)]
    expected = [computed(case, "blockwise") for case in cases]
    monkeypatch.setattr(tiles, "_TILE_SCORES", tile_scores)
    for case, one_tile in zip(cases, expected, strict=True):
        cut = computed(case, "blockwise")
        torch.testing.assert_close(cut.out, one_tile.out)
        torch.testing.assert_close(cut.max_logit, one_tile.max_logit)
        torch.testing.assert_close(cut.entropy, one_tile.entropy)
        torch.testing.assert_close(cut.gradients, one_tile.gradients)


MEMORY_PROBE = """
import sys
import torch
from longshort import HeadLayout, attention
torch.set_num_threads(1)
length, window, packed, stats, transposed = (int(x) for x in sys.argv[1:])

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def grown(length):
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
    if transposed:
        q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v))
    ids = (torch.arange(length) // 700)[None] if packed else None
    with open("/proc/self/clear_refs", "w") as reset_peak:
        reset_peak.write("5")
    before = memory("VmRSS")
    out = attention(q, k, v, HeadLayout((window or None,)), segment_ids=ids, return_stats=bool(stats))
    (out[0] if stats else out).sum().backward()
    return memory("VmHWM") - before

print(grown(length))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("length", "window", "packed", "stats", "transposed", "mebibytes"),
    [
        (65_536, 128, 0, 1, 0, 256),
        (65_536, 128, 1, 0, 0, 256),
        (16_384, 0, 1, 0, 0, 128),
        (16_384, 0, 0, 0, 1, 128),  # SDPA, with strides for which it has no kernel without n×n scores
    ],
)
def test_memory_beyond_the_inputs(
    length: int, window: int, packed: int, stats: int, transposed: int, mebibytes: int
):
    """Peak resident memory of forward and backward together, in a process of its own."""
    arguments = [str(x) for x in (length, window, packed, stats, transposed)]
    probe = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, *arguments], capture_output=True, text=True, check=True
    )
    grown = float(probe.stdout)
    minimum = 3 * length * 64 * 4 / 2**20  # three gradients at least, or nothing was measured
    assert minimum < grown < mebibytes
