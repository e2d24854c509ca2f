"""metrics.jsonl: strict, appended to by one process, cut back on resuming, read with half a last line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longshort.training.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog, read_metrics


def write_steps(run: Path, first: int, last: int, **extra: Any) -> None:
    log = MetricsLog(run)
    log.begin(first - 1)
    for step in range(first, last + 1):
        log.write({"step": step, "loss": 1 / step, **extra})
    log.close()


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run)]


def test_lines_come_back_as_written(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3, max_logit_by_head=[[0.1, 2.0], [3.0, 4.0]])
    assert read_metrics(tmp_path)[2] == {
        "step": 3, "loss": 1 / 3, "max_logit_by_head": [[0.1, 2.0], [3.0, 4.0]]
    }  # fmt: skip


def test_line_is_on_file_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.begin(0)
    log.write({"step": 1})
    assert steps_of(tmp_path) == [1]
    log.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.begin(0)
    log.write({"step": 1, "loss": math.nan, "max_logit": math.inf, "by_head": [[1.0, -math.inf]]})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "max_logit": None, "by_head": [[1.0, None]]}
    assert read_metrics(tmp_path) == [line]


@pytest.mark.parametrize("end", [b"", b'{"step": 8, "lo', b'{"step": 8}', b"\x00\x00\x00"])
def test_half_a_last_line_is_neither_read_nor_kept(tmp_path: Path, end: bytes) -> None:
    write_steps(tmp_path, 1, 7)
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(end)
    assert steps_of(tmp_path) == list(range(1, 8))
    write_steps(tmp_path, 6, 9)
    assert steps_of(tmp_path) == list(range(1, 10))


@pytest.mark.parametrize("step", [0, 3, 7, 20])
def test_going_on_cuts_what_comes_after_the_step(tmp_path: Path, step: int) -> None:
    write_steps(tmp_path, 1, 7)
    log = MetricsLog(tmp_path)
    log.begin(step)
    log.close()
    assert steps_of(tmp_path) == list(range(1, min(step, 7) + 1))


def test_only_one_process_writes(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    log = MetricsLog(tmp_path)
    with pytest.raises(BlockingIOError, match="is being trained by another process"):
        MetricsLog(tmp_path)
    log.close()
    MetricsLog(tmp_path).close()
    assert steps_of(tmp_path) == [1, 2]


def test_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from longshort.training.metrics import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}))
log.begin(0)
log.write({{"step": 1}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert steps_of(tmp_path) == [1]
    MetricsLog(tmp_path).close()


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "line 2: not JSON"), ("[1, 2]", "line 2: not an object with a step"), ("{}", "line 2")],
)
def test_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match=message):
        log.begin(3)
    log.close()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in"):
        read_metrics(tmp_path)


def test_tensorboard_shows_each_step_once_after_going_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 6), (4, 8)):
        log = MetricsLog(tmp_path)
        log.begin(first - 1, tensorboard=True)
        for step in range(first, last + 1):
            log.write(
                {"step": step, "loss": float(10 * first + step), "max_logit_by_head": [[1.0, float(step)]]}
            )
        log.sync()
        log.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 11), (2, 12), (3, 13), (4, 44), (5, 45), (6, 46), (7, 47), (8, 48)
    ]  # fmt: skip
    by_head = events.Scalars("max_logit_by_head/layer_0/head_1")
    assert [event.value for event in by_head] == [1, 2, 3, 4, 5, 6, 7, 8]
