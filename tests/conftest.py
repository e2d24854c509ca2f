"""Settings of the whole test run: one thread, property tests without deadlines, less garbage collection."""

import gc
import math
import os
from importlib.util import find_spec

# Before torch is imported, so that the processes that tests start inherit it: the tensors are small, and
# one thread gives them the same sums on every machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from longshort.cli import main

torch.set_num_threads(1)

# A machine with a GPU, for tests/cuda, need have nothing but torch and pytest.
if find_spec("rich"):
    from longshort.reporting import console

    console.SECONDS_BETWEEN_LINES = math.inf  # the output is the same on a busy machine
if find_spec("hypothesis"):
    import hypothesis

    # A compiling or busy machine is slow, not wrong; derandomized runs fail in the same place for everyone.
    hypothesis.settings.register_profile("longshort", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("longshort")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what modules hold, which would take it a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


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
