"""Run an installed longshort: attention and its gradients, by the C++ kernels, or with --pure without them.

The truth is the backend `reference` in float64.
"""

import sys

import torch

from longshort import HeadLayout, attention, explain


def gradients(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
    """Return the output of a call and the gradients of its q, k and v, in float64."""
    generator = torch.Generator().manual_seed(0)
    layout = HeadLayout.split(num_heads=4, num_global=1, window=20)
    qkv = [torch.randn(2, 4, 150, 40, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    out = attention(*qkv, layout, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), qkv)
    return tuple(x.detach().double() for x in (out, *grads))


def main() -> None:
    """Check the backend that `auto` takes on this machine's CPU."""
    expected = "blockwise" if sys.argv[1:] == ["--pure"] else "cpu"
    q = torch.zeros(1, 2, 4, 8)
    taken = explain(q, q, q, HeadLayout.split(num_heads=2, num_global=1, window=2))
    if taken.backend != expected:
        sys.exit(f"backend is {taken.backend}, should be {expected}\n{taken}")
    for got, truth in zip(
        gradients(torch.float32, "auto"), gradients(torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
    print(f"{expected}: attention and its gradients are right")


if __name__ == "__main__":
    main()
