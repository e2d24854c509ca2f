import pytest
import torch

from longshort.backends import triton
from longshort.cli import main

needs_triton = pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))


@needs_triton
def test_registers_are_shown_without_a_gpu(capsys):
    flags = ["--kernels", "decode", "--targets", "sm90", "gfx942", "--head-dims", "64"]
    assert main(["bench", "kernels", "--compile-only", *flags]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["registers", "spilled"]
    assert [line.split()[:3] for line in lines] == [
        ["decode", dtype, "64"] for dtype in ("bfloat16", "float32") for _ in range(2)
    ]
    assert all(int(line.split()[-2]) > 0 for line in lines)


@needs_triton
def test_a_search_needs_a_gpu(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails(1, "bench", "kernels")
    assert "there is no GPU here to time on; --compile-only needs none" in message


def test_triton_that_is_missing_is_named(fails, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda device=None: "triton is not installed")
    assert "triton is not installed; pip install triton" in fails(1, "bench", "kernels", "--compile-only")
