"""The Triton kernels by their tiles: registers of the machine code, and on a GPU the fastest tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Le

from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from longshort.backends.triton.tiles import Tiles

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HEADS, _WINDOW = 12, 128


@dataclass(frozen=True)
class KernelsBenchmark:
    """Time the Triton kernels on this GPU with tiles of many sizes, or compile them for any GPU.

    The times are of all heads of one layer (12 heads, one of them global, the others of window 128), for the
    table in longshort/backends/triton/tiles.py. A thread that needs more registers than there are keeps
    numbers in memory: it spills, which is slow.
    """

    compile_only: bool = False
    """Show registers and spilled bytes of the tiles in use; nothing runs, so no GPU is needed."""

    targets: tuple[Literal["sm80", "sm89", "sm90", "sm100", "gfx942"], ...] = (
        "sm80", "sm89", "sm90", "sm100", "gfx942",
    )  # fmt: skip
    """GPUs to compile for: A100, Ada (L4, L40S, RTX 4090), H100 and H200, B200, MI300."""

    kernels: tuple[Literal["forward", "grad_q", "grad_kv", "decode"], ...] = (
        "forward", "grad_q", "grad_kv", "decode",
    )  # fmt: skip
    """The forward pass, the gradient of q, those of k and v, and decoding (which is compiled alone)."""

    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    """Precisions of q, k and v."""

    head_dims: tuple[Annotated[int, Ge(1), Le(256)], ...] = (64, 128, 256)
    """Entries of a query."""

    length: Annotated[int, Ge(1)] = 8192
    """Tokens of the sequence that is timed."""

    def run(self, show: Callable[[str], None]) -> None:
        """Show a line for each kernel.

        Raises:
            ValueError: triton is not installed, or there is no GPU to time on.
        """
        from longshort.backends import triton as backend

        reason = backend.missing()
        if reason is not None:
            raise ValueError(f"{reason}; pip install triton")
        if self.compile_only:
            self._show_registers(show)
            return
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here to time on; --compile-only needs none")
        self._search(show)

    def _cases(self) -> Iterator[tuple[str, str, int]]:
        for kernel in self.kernels:
            for dtype in self.dtypes:
                for head_dim in self.head_dims:
                    yield kernel, dtype, head_dim

    def _show_registers(self, show: Callable[[str], None]) -> None:
        from longshort.backends.triton.compiling import compile_kernel
        from longshort.backends.triton.tiles import tiles_of

        of_kernel = f"{'kernel':<8} {'dtype':<9} {'head_dim':>8} {'rows×keys, warps':<18}"
        show(f"{of_kernel} {'target':<7} registers spilled")
        for kernel, dtype, head_dim in self._cases():
            for target in self.targets:
                tiles = tiles_of(kernel, head_dim, _DTYPES[dtype], target)
                found = compile_kernel(kernel, target, _DTYPES[dtype], head_dim)
                show(
                    f"{kernel:<8} {dtype:<9} {head_dim:>8} {_text(tiles):<18} {target:<7} "
                    f"{found.registers:>9} {found.spilled:>7}"
                )

    def _search(self, show: Callable[[str], None]) -> None:
        show(f"{'kernel':<8} {'dtype':<9} {'head_dim':>8} {'rows×keys, warps, stages':<26} ms")
        for kernel, dtype, head_dim in self._cases():
            if kernel == "decode":
                continue
            times = _times(kernel, _DTYPES[dtype], head_dim, self.length)
            for tiles, milliseconds in sorted(times.items(), key=lambda item: item[1])[:3]:
                text = f"{_text(tiles)}, {tiles.stages}"
                show(f"{kernel:<8} {dtype:<9} {head_dim:>8} {text:<26} {milliseconds:.3f}")


def _text(tiles: Tiles) -> str:
    return f"{tiles.rows}×{tiles.keys}, {tiles.warps}"


def _times(kernel: str, dtype: torch.dtype, head_dim: int, length: int) -> dict[Tiles, float]:
    """Time a call with each size of tiles that fits: medians in milliseconds, without the host's part."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench_cudagraph

    from longshort.backends.triton.tiles import candidates, using

    run = _call(kernel, dtype, head_dim, length)
    found: dict[Tiles, float] = {}
    for tiles in candidates():
        with using(kernel, tiles):
            try:
                run()  # compiles
                torch.cuda.synchronize()
            except (OutOfResources, PTXASError, CompilationError):
                continue
            median: Any = do_bench_cudagraph(run, return_mode="median")
            found[tiles] = median
    return found


def _call(kernel: str, dtype: torch.dtype, head_dim: int, length: int) -> Callable[[], object]:
    """Return a call that launches a kernel: the forward pass, or all of the backward pass."""
    from longshort.backends import triton as backend
    from longshort.backends.triton import operator

    assert operator  # its import registers the operators
    layout = HeadLayout.split(_HEADS, 1, _WINDOW)
    shape = (1, _HEADS, length, head_dim)
    q, k, v, grad_out = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(4))
    options = (backend.windows_of_kv_heads(layout), 0, True, head_dim**-0.5, None)
    operators = torch.ops.longshort

    def forward() -> Any:
        return operators.triton_attention(q, k, v, None, None, *options, dtype, False)

    if kernel == "forward":
        return forward
    saved = forward()[:3]
    return lambda: operators.triton_attention_backward(q, k, v, None, None, *saved, grad_out, None, *options)
