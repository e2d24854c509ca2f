"""Compiles the kernels for GPUs that need not be there, and reads what their machine code takes of registers.

A kernel whose numbers do not fit into the registers of its threads spills them to memory, which is slow and
does not show anywhere else.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longshort.backends.triton import backward, decode, forward
from longshort.backends.triton.launching import compiler_options, padded
from longshort.backends.triton.tiles import Tiles, tiles_of

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""GPUs: A100, Ada (L4, L40S, RTX 4090), H100 and H200, B200, MI300."""

KERNELS = {
    "forward": forward.forward_kernel,
    "delta": backward.delta_kernel,
    "grad_q": backward.grad_q_kernel,
    "grad_kv": backward.grad_kv_kernel,
    "decode": decode.decode_kernel,
    "merge": decode.merge_kernel,
}

_DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_OF_THE_INPUTS_DTYPE = {"Q", "K", "V", "OUT", "GRAD_OUT", "GRAD_Q", "GRAD_K", "GRAD_V"}
_INTEGERS = {
    "ORDER", "WINDOWS", "IDS", "FIRST", "LAST", "SINKS_BEGIN", "SINKS_END", "SINK_POSITIONS", "SLOTS",
}  # fmt: skip
_OPTIONS = {
    "CAUSAL": True, "SOFTCAP": False, "ALIBI": False, "SEGMENTS": False, "SINKS": False, "HAS_SINKS": False,
    "STATS": False, "HAS_OUT": True, "CAREFUL": False, "GROUP": 1, "ALIGNED": True,
    "HAS_LSE": True, "SPLITS": 64, "PRECISION": "ieee",
}  # fmt: skip
_LONG = {"TABLE", "LENGTH", "KEY_IDS", "ALL_SINKS"}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What the machine code of a kernel takes.

    Attributes:
        registers: the number of registers of a thread.
        spilled: bytes of a thread in memory, for want of registers.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


def compile_kernel(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    head_dim: int,
    tiles: Tiles | None = None,
    **options: Any,
) -> Resources:
    """Compile a kernel for a GPU, which need not be there.

    Args:
        kernel: a name of `KERNELS`.
        target: a name of `TARGETS`.
        dtype: the dtype of q, k and v.
        head_dim: 1 … 256.
        tiles: None: those that calls get.
        **options: the kernel's constants, such as CAUSAL or STATS; without them a plain causal call.
    """
    function = KERNELS[kernel]
    tiles = tiles or tiles_of(kernel, head_dim, dtype, target)
    constants = {
        **_OPTIONS, "D": head_dim, "BLOCK_D": padded(head_dim), "ROWS": tiles.rows,
        "KEYS": tiles.keys, **options,
    }  # fmt: skip
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        kind, is_aligned = _kind_of(name, dtype), True
        if name in constants:
            kind, fixed[(index,)], is_aligned = "constexpr", constants[name], False
        elif re.fullmatch(r"stride_.d", name):
            kind, fixed[(index,)], is_aligned = "constexpr", 1, False
        elif not (kind.startswith("*") or name.startswith("stride_")):
            is_aligned = False
        signature[name] = kind
        if is_aligned:
            attributes[(index,)] = _ALIGNED
    compiled = triton.compile(
        ASTSource(function, signature, fixed, attributes),
        target=TARGETS[target],
        options=compiler_options(tiles),
    )
    registers, spilled = _read(compiled.asm)
    return Resources(registers, spilled, compiled.metadata.shared)


def _kind_of(name: str, dtype: torch.dtype) -> str:
    if name in _OF_THE_INPUTS_DTYPE:
        return _DTYPES[dtype]
    if name in _INTEGERS:
        return "*i32"
    if name in _LONG:
        return "*i64"
    if name.isupper() and len(name) > 1:
        return "*fp32"
    return "fp32" if name in ("scale", "softcap") else "i32"


def _read(asm: dict[str, Any]) -> tuple[int, int]:
    """Read the registers, and the bytes spilled, of a thread."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        return registers, 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None
    return int(found[1]), int(found[2])
