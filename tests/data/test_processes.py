"""Encoding in several processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import longshort
from longshort.data import train_bpe
from longshort.data.processes import EncodingProcesses
from longshort.data.tokenization import Encoder

pytestmark = pytest.mark.timeout(120)


@dataclass
class Texts:
    texts: list[str]


ITEMS = [Texts([f"text {i} {j} größer\0 " * (1 + 37 * i % 50) for j in range(i % 4)]) for i in range(40)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_bpe(["some text größer"] * 3, 280))


@pytest.mark.parametrize("count", [1, 3])
def test_items_come_in_order_with_the_same_ids(encoder: Encoder, count: int) -> None:
    read: list[int] = []

    def items() -> Iterator[Texts]:
        for number, item in enumerate(ITEMS):
            read.append(number)
            yield item

    with EncodingProcesses(encoder, count) as processes:
        for number, (item, ids) in enumerate(processes.encode(items())):
            assert len(read) - number <= 2 * count  # few are read ahead
            assert item is ITEMS[number]
            assert [i.tolist() for i in ids] == [i.tolist() for i in encoder.encode(item.texts)]
        children = processes._processes
    assert number == len(ITEMS) - 1
    assert [child.returncode for child in children] == [0] * count


def test_a_text_larger_than_a_pipe(encoder: Encoder) -> None:
    with EncodingProcesses(encoder, 2) as processes:
        long = [Texts(["some text " * 30_000]) for _ in range(5)]
        assert [len(ids[0]) for _, ids in processes.encode(long)] == [
            len(encoder.encode(long[0].texts)[0])
        ] * 5


def test_a_process_that_dies_is_an_error(encoder: Encoder) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def kill_one() -> None:
        with EncodingProcesses(encoder, 2) as processes:
            children.extend(processes._processes)
            for number, _ in enumerate(processes.encode(ITEMS)):
                if number == 3:
                    children[0].kill()

    with pytest.raises(ChildProcessError, match=r"was killed by signal 9; it may have run out of memory"):
        kill_one()
    assert all(child.returncode is not None for child in children)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_processes(encoder: Encoder, error: type[BaseException]) -> None:
    def items() -> Iterator[Texts]:
        yield from ITEMS[:9]
        raise error

    with pytest.raises(error), EncodingProcesses(encoder, 2) as processes:
        list(processes.encode(items()))
    assert all(child.returncode is not None for child in processes._processes)


def test_the_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
import time
from longshort.data.processes import EncodingProcesses
from longshort.data import train_bpe
from longshort.data.tokenization import Encoder
with EncodingProcesses(Encoder(train_bpe(["a"], 258)), 2) as processes:
    open({str(tmp_path / "pids")!r}, "w").write(" ".join(str(p.pid) for p in processes._processes) + " .")
    time.sleep(100)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(longshort.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().endswith("."):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()[:-1]]
    assert len(children) == 2
    while any(map(_runs, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
