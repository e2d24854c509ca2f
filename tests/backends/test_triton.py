"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from longshort import HeadLayout, attention, explain
from longshort.backends.triton import missing, tiles

TESTS = Path(__file__).parents[1]
PARTS = ["test_calls.py", "test_decoding.py", "test_not_finite.py", "test_recorded_steps.py"]
KERNELS = ["forward", "delta", "grad_q", "grad_kv", "decode", "merge"]
SHARED = {"sm80": 163, "sm89": 99, "sm90": 227, "sm100": 227, "gfx942": 64}
"""KiB of shared memory of a program, by GPU."""
TUNED_FOR = "3.7"
"""The Triton that the blocks were chosen with. Others may spill up to an eighth of a thread's 1 KiB of
registers; 3.8 spills 104 bytes at most."""
OPTIONS: list[dict[str, Any]] = [
    {"STATS": True}, {"SEGMENTS": True, "SINKS": True, "HAS_SINKS": True}, {"SOFTCAP": True, "ALIBI": True},
    {"CAREFUL": True}, {"GROUP": 4}, {"CAUSAL": False}, {"HAS_OUT": False}, {"PRECISION": "tf32x3"},
]  # fmt: skip

_SLOW_PART = "test_recorded_steps.py"
_QUICK_TARGETS = ("sm90", "gfx942")  # one GPU of each vendor
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@needs_triton
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow) if part == _SLOW_PART else part for part in PARTS]
)
def test_interpreted(part: str, request: pytest.FixtureRequest) -> None:
    """Run these tests in another process, since the interpreter must be chosen before Triton is imported."""
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


BUILDS = [
    pytest.param(dtype, head_dim, target, marks=[] if target in _QUICK_TARGETS else [pytest.mark.slow])
    for dtype in (torch.bfloat16, torch.float32)
    for head_dim in (64, 128, 256)
    for target in SHARED
]


@needs_triton
@pytest.mark.parametrize(("dtype", "head_dim", "target"), BUILDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_and_do_not_spill(
    kernel: str, dtype: torch.dtype, head_dim: int, target: str
) -> None:
    from longshort.backends.triton.compiling import compile_kernel

    found = compile_kernel(kernel, target, dtype, head_dim)
    allowed = 0 if metadata.version("triton").startswith(f"{TUNED_FOR}.") else 128
    assert found.spilled <= allowed or head_dim == 256
    assert 0 < found.registers <= 512
    assert found.shared <= SHARED[target] * 1024


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_option_compiles(kernel: str, options: dict[str, Any], target: str) -> None:
    from longshort.backends.triton.compiling import compile_kernel

    if "PRECISION" in options and target == "gfx942":
        pytest.skip("AMD has no TF32")
    dtype = torch.float32 if "PRECISION" in options else torch.float16
    for head_dim in (24, 128):
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
    wanted = next(tiles.candidates())
    usual = tiles.tiles_of("forward", 64, torch.bfloat16, "sm90")
    assert wanted != usual
    with tiles.using("forward", wanted):
        assert tiles.tiles_of("forward", 64, torch.bfloat16, "sm90") == wanted
        assert tiles.tiles_of("grad_q", 64, torch.bfloat16, "sm90") != wanted
    assert tiles.tiles_of("forward", 64, torch.bfloat16, "sm90") == usual
