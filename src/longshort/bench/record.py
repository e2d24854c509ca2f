"""The rows of every benchmark: one metric of one provider at one point of a sweep.

A table of rows is a DataFrame, and a CSV file. Its columns are `benchmark`, `setting` (a description of what
is constant along a line of a plot), `x` (tokens), `provider`, `metric`, `unit`, `p10`, `p50` and `p90`
(percentiles over `rounds` rounds), then the numbers of the setting, and the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from longshort.reporting.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

METRICS = {
    # times: a whole turn, by the clock that the benchmark chose, and attention alone, in all layers or one
    "milliseconds": "ms",
    "microseconds": "us",
    "cpu_milliseconds": "ms",
    "wall_milliseconds": "ms",
    "attention_milliseconds": "ms",
    "attention_microseconds": "us",
    "attention_share": "ratio",
    # work: the least that must be computed or read, and the speed of it
    "visible_pairs": "pairs",
    "parameters": "parameters",
    "cache_bytes": "B",
    "bytes_read": "B",
    "bytes_moved": "B",
    "tokens_per_second": "1/s",
    "gigabytes_per_second": "GB/s",
    "gflops": "GFLOP/s",
    "fma_peak": "GFLOP/s",
    "matmul_peak": "GFLOP/s",
    "peak_share": "ratio",
    "copy_rate": "GB/s",
    "copy_share": "ratio",
    # memory: its peak before and after, and the difference
    "peak_before": "B",
    "peak_bytes": "B",
    "increment_bytes": "B",
    "increment_by_mhsa": "ratio",
    "increment_by_gpt2": "ratio",
    # comparisons with a baseline, by round
    "speedup": "ratio",
    "speedup_over_mhsa": "ratio",
    "speedup_over_gpt2": "ratio",
    "attention_speedup_over_mhsa": "ratio",
    "floor_ratio": "ratio",
    "extra": "ratio",
    "extra_per_step": "ratio",
    # Amdahl's bound on the time, what it saves of the baseline's time, and what was saved
    "bound_mhsa": "ms",
    "bound_gpt2": "ms",
    "saving_allowed_mhsa": "ratio",
    "saving_allowed_gpt2": "ratio",
    "saving_mhsa": "ratio",
    "saving_gpt2": "ratio",
}
"""The unit of each metric."""

ROUND_KEYS = ["group", "round", "provider"]
"""The index of a table of rounds. Providers of one group were measured in turns, in the same rounds."""

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Column(NamedTuple):
    """A column of a printed table: title, metric, format, factor of the number and percentile."""

    title: str
    metric: str
    form: str
    scale: float = 1.0
    at: str = "p50"


def in_same_round(rounds: pd.DataFrame, metric: str, provider: str) -> pd.Series:
    """Return a metric of `provider` for each row of a table of rounds; NaN if it is not in the round."""
    if provider not in rounds.index.unique("provider"):
        return pd.Series(float("nan"), rounds.index)
    theirs: pd.Series = rounds[metric].xs(provider, level="provider")  # pyright: ignore[reportAssignmentType]
    return theirs.reindex(rounds.index.droplevel("provider")).set_axis(rounds.index)


def summarize(rounds: pd.DataFrame, point: Mapping[str, Any], context: Mapping[str, Any]) -> pd.DataFrame:
    """Summarize the rounds of one point of a sweep as rows.

    Args:
        rounds: columns named in `METRICS`, indexed by `ROUND_KEYS`; each number of a list in a cell is a
            sample. NaN and inf, such as a comparison with a missing provider, are left out.
        point: columns before the others, the same in all rows.
        context: columns after the others, the same in all rows.
    """
    names = [name for name in METRICS if name in rounds]
    cells: pd.Series = rounds[names].stack()  # pyright: ignore[reportAssignmentType]
    values = cells.rename_axis([*ROUND_KEYS, "metric"]).explode().astype(float)
    samples = values.where(values.abs() < float("inf")).dropna()
    groups = samples.groupby(["provider", "metric"], sort=False)
    rows = pd.DataFrame({name: groups.quantile(q).map(_five_digits) for name, q in _QUANTILES.items()})
    rows = rows.reset_index().assign(rounds=len(rounds.index.unique("round")), **context)
    rows.insert(2, "unit", [METRICS[metric] for metric in rows["metric"]])
    return pd.DataFrame(point, rows.index).join(rows)


def wide(rows: pd.DataFrame, at: str = "p50") -> pd.DataFrame:
    """Return a percentile of the metrics of one point of a sweep, providers × metrics."""
    table = rows.pivot(index="provider", columns="metric", values=at)
    return table.reindex(index=rows["provider"].unique(), columns=list(METRICS))


def as_table(rows: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    """Format one point of a sweep as lines of a table, header first; what was not measured is blank."""
    tables = {at: wide(rows, at) for at in _QUANTILES}
    names = list(tables["p50"].index)
    cells = [["provider", *names]]
    for column in columns:
        values = column.scale * tables[column.at][column.metric]
        cells.append([column.title, *("" if pd.isna(x) else format(x, column.form) for x in values)])
    widths = [max(map(len, texts)) for texts in cells]
    return [
        f"  {line[0]:<{widths[0]}}"
        + "".join(f"{text:>{max(10, width + 2)}}" for text, width in zip(line[1:], widths[1:], strict=True))
        for line in zip(*cells, strict=True)
    ]


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Write a CSV file; an older one stays until the new one is complete."""
    replace_file(path, rows.to_csv(index=False).encode())


def read_rows(path: Path) -> pd.DataFrame:
    """Read the rows of a CSV file that a benchmark wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a CSV; the message names it and the columns that it lacks.
    """
    rows = pd.read_csv(path)
    needed = ["benchmark", "setting", "x", "provider", "metric", "unit", *_QUANTILES, "rounds"]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    return rows


def _five_digits(value: float) -> float:
    """Round a measured number to five significant digits; a count stays exact."""
    return value if value.is_integer() else float(f"{value:.5g}")
