"""Settings of the whole test run: one thread, and property tests without deadlines."""

import math
import os

# Before torch is imported, so that the processes that tests start inherit it: the tensors are small, and
# one thread gives them the same sums on every machine.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

from longshort.cli import console, main

torch.set_num_threads(1)
console.SECONDS_BETWEEN_LINES = math.inf  # the output is the same on a busy machine

# A compiling or busy machine is slow, not wrong; derandomized runs fail in the same place for everyone.
hypothesis.settings.register_profile("longshort", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("longshort")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in a test wherever and after whatever it runs."""
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys):
    """Calls a command that must fail in good manners, and gives its message."""

    def call(code, *arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        if code == 1:
            assert captured.err.startswith("longshort: error: ")
            assert len(captured.err.splitlines()) == 1
        return " ".join(captured.err.replace("│", " ").split())  # the parser's messages are wrapped and boxed

    return call
