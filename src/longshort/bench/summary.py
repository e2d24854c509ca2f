"""The few ratios that matter on a GPU, from the CSV files of `make gpu-bench`.

`python -m longshort.bench.summary FOLDER` reads them and writes FOLDER/summary.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pandas as pd

from longshort.bench.record import read_rows
from longshort.reporting.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping


class Question(NamedTuple):
    """A ratio of medians of two providers, at each point of a benchmark that it is about.

    Attributes:
        title: the question in words.
        over, under: the providers whose metric is above and below the line.
        metric: a metric of `longshort.bench.record`.
        form: format of the ratio.
        where: values of columns that select the points.
    """

    title: str
    over: str
    under: str
    metric: str
    form: str
    where: Mapping[str, Any]


_LOCAL = {"benchmark": "attention", "global_heads": 0, "window": 128, "x": 16_384}
_LS = {"benchmark": "attention", "global_heads": 1, "window": 128}
QUESTIONS = (
    Question(
        "Local heads alone: FLOP/s on visible pairs, of SDPA's own", "triton", "sdpa", "gflops", ".0%", _LOCAL
    ),
    Question(
        "LS with one global head: times faster than FlexAttention", "flex", "triton", "milliseconds", ".2f",
        _LS,
    ),
    Question(
        "LS with one global head, forward and backward: times faster than MHSA by SDPA", "sdpa",
        "triton", "milliseconds", ".2f", {**_LS, "x": 16_384, "pass": "forward-backward"},
    ),
    Question(
        "A token after a context: times faster than MHSA, whole models", "mhsa", "ls", "milliseconds", ".2f",
        {"benchmark": "decode", "x": 32_768},
    ),
    Question(
        "Time with statistics, of the time without", "triton-statistics", "triton", "milliseconds", ".1%",
        {"benchmark": "attention"},
    ),
)  # fmt: skip


def summarize(rows: pd.DataFrame) -> str:
    """Answer the questions in Markdown; what was not measured is said.

    Args:
        rows: rows of benchmarks, as `longshort.bench.record` describes them; none are allowed. Of what was
            measured twice, the first counts.
    """
    if len(rows):
        rows = rows.drop_duplicates(["benchmark", "setting", "x", "provider", "metric"])
    parts = ["# Measured on a GPU", *_machines(rows)]
    for question in QUESTIONS:
        parts.append(f"## {question.title}")
        parts.append("\n".join(_answers(rows, question)))
    return "\n\n".join(parts) + "\n"


def _machines(rows: pd.DataFrame) -> list[str]:
    found = rows[["accelerator", "torch_version"]].drop_duplicates() if len(rows) else rows
    names = [
        f"{'a CPU' if pd.isna(accelerator) else accelerator}, torch {version}"
        for accelerator, version in found.itertuples(index=False)
    ]
    measured = "Ratios of medians. Each line is the setting, `a / b` and the ratio."
    return [f"{'; '.join(names)}. {measured}" if names else "Nothing was measured."]


def _answers(rows: pd.DataFrame, question: Question) -> list[str]:
    columns = ["x", "setting", "provider", "metric", "p50", *question.where]
    points = rows.reindex(columns=list(dict.fromkeys(columns)))
    for column, value in question.where.items():
        points = points.loc[points[column].eq(value)]
    lines = []
    for key, point in points.groupby(["x", "setting"], sort=False):
        length, setting = cast("tuple[int, str]", key)
        medians = point[point["metric"] == question.metric].set_index("provider")["p50"]
        where = f"- {length:,} tokens, {setting}"
        absent = [name for name in (question.over, question.under) if name not in medians]
        if absent:
            lines.append(f"{where}: not measured, {' and '.join(absent)} missing")
            continue
        ratio = medians[question.over] / medians[question.under]
        lines.append(f"{where}: `{question.over} / {question.under}` **{ratio:{question.form}}**")
    wanted = ", ".join(f"{name} {value}" for name, value in question.where.items())
    return lines or [f"Not measured: there are no rows of {wanted}."]


def write_summary(folder: Path) -> Path:
    """Write summary.md from the CSV files of a folder; an older one is replaced.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a CSV file holds no benchmark.
    """
    tables = [read_rows(path) for path in sorted(folder.glob("*.csv"))]
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    file = folder / "summary.md"
    replace_file(file, summarize(rows).encode())
    return file


if __name__ == "__main__":
    print(write_summary(Path(sys.argv[1])).read_text())
