"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longshort import HeadLayout, attention, explain
from longshort.backends.triton import missing, tiles

TESTS = Path(__file__).parents[1]
PARTS = ["test_calls.py", "test_not_finite.py"]
OPTIONS: list[dict[str, object]] = [
    {"STATS": True}, {"SEGMENTS": True, "SINKS": True, "HAS_SINKS": True}, {"SOFTCAP": True, "ALIBI": True},
    {"CAREFUL": True}, {"GROUP": 4}, {"CAUSAL": False}, {"HAS_OUT": False}, {"PRECISION": "tf32x3"},
]  # fmt: skip

needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@needs_triton
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str, request: pytest.FixtureRequest) -> None:
    """The interpreter is chosen when Triton is imported: so this part has a process of its own."""
    chosen = request.config.getoption("-m") or ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen]
    run = subprocess.run(
        [*command, str(TESTS / "interpreted" / part)],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_no_kernel_spills(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    from longshort.backends.triton.compiling import TARGETS, compile_kernel

    for target in TARGETS:
        found = compile_kernel(kernel, target, dtype, head_dim)
        assert found.spilled == 0, target
        assert 0 < found.registers <= 512


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_every_option_compiles(kernel: str, options: dict[str, object]) -> None:
    from longshort.backends.triton.compiling import TARGETS, compile_kernel

    dtype = torch.float32 if "PRECISION" in options else torch.float16
    for target in TARGETS:
        for head_dim in (24, 64, 256):
            assert compile_kernel(kernel, target, dtype, head_dim, **options).registers > 0


def test_tensors_on_a_cpu_are_refused() -> None:
    layout = HeadLayout.split(2, 1, 4)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind()
    with pytest.raises(
        ValueError, match="'triton' cannot serve this call: the tensors are on cpu, not on a GPU"
    ):
        attention(q, k, v, layout, backend="triton")
    assert explain(q, k, v, layout).reasons["triton"] == "the tensors are on cpu, not on a GPU"


def test_tiles_can_be_set_for_a_search() -> None:
    wanted = tiles.Tiles(16, 16, 4, 1)
    usual = tiles.tiles_of("forward", 64, torch.bfloat16)
    assert wanted != usual and wanted not in list(tiles.candidates())
    with tiles.using("forward", wanted):
        assert tiles.tiles_of("forward", 64, torch.bfloat16) == wanted
        assert tiles.tiles_of("grad_q", 64, torch.bfloat16) != wanted
    assert tiles.tiles_of("forward", 64, torch.bfloat16) == usual
