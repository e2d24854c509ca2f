"""The driver of all benchmarks.

In each case the providers take turns: every round runs each of them once, so that other load on the machine
affects all of them alike. The first round is for warm-up. Comparisons are made within a round, and
percentiles over rounds are reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch

from longshort.bench.benchmark import UnsuitableError
from longshort.bench.machine import machine_columns
from longshort.bench.plot import plot_rows
from longshort.bench.record import ROUND_KEYS, as_table, summarize, wide, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from longshort.bench.benchmark import Benchmark, Case, LeaveOut, Turn


class Remark(NamedTuple):
    """A remark on a provider: why it was left out of a case, or what its numbers leave out."""

    provider: str
    case: str
    text: str


class Results(NamedTuple):
    """The measurements of a benchmark.

    Attributes:
        rows: a row for each metric of each provider and case, as `longshort.bench.record` describes them.
        rounds: the metrics of every round after warm-up, by setting, x, group, round and provider.
        left_out: providers that were not measured in a case, and why.
        notes: remarks on what the numbers of a provider leave out.
    """

    rows: pd.DataFrame
    rounds: pd.DataFrame
    left_out: list[Remark]
    notes: list[Remark]


def measure(
    benchmark: Benchmark,
    show: Callable[[str], None] = lambda _text: None,
    report_progress: Callable[[float], None] = lambda _share: None,
) -> Results:
    """Measure all cases, and writes `benchmark.out` and its plot if it is given.

    torch's number of threads is set for each case, and restored.

    Args:
        benchmark: the benchmark.
        show: takes lines of text one by one: the machine, a table for each case, what was left out.
        report_progress: takes the share of the cases and rounds that are done.

    Raises:
        FileExistsError: a file of `benchmark.out` exists and `overwrite` is not set, or is a folder.
        FileNotFoundError: there is no folder for it.
        PermissionError: nothing may be written to that folder.
        ValueError: no provider could be measured in any case; the message has the reasons.
    """
    out = benchmark.out
    if out is not None:
        _check_out(out, benchmark.overwrite)
    cases, rows, rounds = benchmark.cases(), [], {}
    driver = _Driver(benchmark)
    threads_before = torch.get_num_threads()
    try:
        show(benchmark.describe_machine())
        for number, case in enumerate(cases):
            torch.set_num_threads(case.threads)
            show(f"\n{case}")
            found = driver.measure(case, lambda share, at=number: report_progress((at + share) / len(cases)))
            if found.empty:
                continue
            rounds[case.setting, case.x] = found
            rows.append(_rows(benchmark, case, found))
            for line in as_table(rows[-1], benchmark.columns) + benchmark.sentences(wide(rows[-1])):
                show(line)
            if out is not None:
                write_rows(pd.concat(rows), _partial(out))
        for line in _summary("notes", driver.notes) + _summary("not measured", driver.left_out):
            show(line)
    finally:
        torch.set_num_threads(threads_before)
    if not rows:
        reasons = dict.fromkeys(remark.text for remark in driver.left_out)
        raise ValueError(f"nothing was measured: {'; '.join(reasons)}")
    table = pd.concat(rows, ignore_index=True)
    if out is not None:
        os.replace(_partial(out), out)
        picture = out.with_suffix(".png")
        plot_rows(table, benchmark, picture)
        show(f"\nnumbers: {out}\nplot:    {picture}")
    return Results(table, pd.concat(rounds, names=["setting", "x"]), driver.left_out, driver.notes)


class _Driver:
    """Runs the rounds of one case after another, and collects remarks."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self.left_out: list[Remark] = []
        self.notes: list[Remark] = []

    def measure(self, case: Case, report: Callable[[float], None]) -> pd.DataFrame:
        """Measure a case; returns the metrics of every round after warm-up, by `ROUND_KEYS`."""

        def leave_out(provider: str, text: str) -> None:
            self.left_out.append(Remark(provider, str(case), text))

        samples = []
        groups = self._benchmark.groups(case, leave_out)
        for number, names in enumerate(groups):
            for share, found in self._rounds(case, names, leave_out):
                samples += [{"group": number, **sample} for sample in found]
                report((number + share) / len(groups))
        failed = {remark.provider for remark in self.left_out if remark.case == str(case)}
        samples = [sample for sample in samples if sample["provider"] not in failed]
        if not samples:
            return pd.DataFrame()
        return self._benchmark.derive(case, pd.DataFrame(samples).set_index(ROUND_KEYS))

    def _rounds(
        self, case: Case, names: Sequence[str], leave_out: LeaveOut
    ) -> Iterator[tuple[float, list[dict[str, Any]]]]:
        """Yield the share of the rounds that are done, and the metrics of a round; none for warm-up.

        A provider that fails is removed, so that its memory is free for the others; at the end nothing of the
        group stays in memory.
        """
        benchmark = self._benchmark
        turns: dict[str, Turn] = {}
        with _FailuresReported(names, leave_out):
            inputs = benchmark.inputs(case, names)
            for name in names:
                with _FailuresReported([name], leave_out):
                    turns[name] = benchmark.turn(case, name, inputs, partial(self._note, case, name))
        total = benchmark.warm_up + benchmark.rounds
        for number in range(total):
            found = {}
            for name in list(turns):
                with _FailuresReported([name], leave_out):
                    found[name] = turns[name]()
                    continue
                del turns[name]
            if not turns:
                return
            shared = {"round": number, **benchmark.each_round(case)}
            samples = [{"provider": name, **shared, **metrics} for name, metrics in found.items()]
            yield (number + 1) / total, samples if number >= benchmark.warm_up else []

    def _note(self, case: Case, provider: str, text: str) -> None:
        self.notes.append(Remark(provider, str(case), text))


def groups_in_memory(
    names: Iterable[str],
    need: Callable[[Sequence[str]], float],
    together: float,
    alone: float,
    pair: tuple[str, str],
    leave_out: LeaveOut,
) -> list[list[str]]:
    """Divide providers into groups that fit into memory at once, and so are measured in turns.

    There is one group if all fit together; else one for `pair`, and others for the rest.

    Args:
        names: names of providers.
        need: returns the bytes that some of them take together.
        together: bytes that a group may take.
        alone: bytes that one provider may take, or the pair.
        pair: the two providers whose comparison matters most.
        leave_out: called with each provider that takes more than `alone`.
    """
    fitting = []
    for name in names:
        if need([name]) <= alone:
            fitting.append(name)
        else:
            taken, allowed = need([name]) / 2**30, alone / 2**30
            leave_out(name, f"takes about {taken:.3g} GiB, {allowed:.3g} are allowed; see --max-memory-gib")
    if need(fitting) <= together:
        return [fitting] if fitting else []
    first = [name for name in pair if name in fitting]
    groups = [first] if len(first) == 2 and need(first) <= alone else []
    for name in fitting:
        if groups and name in groups[0]:
            continue
        if groups and need([*groups[-1], name]) <= together:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


class _FailuresReported:
    """A context that leaves out these providers on an UnsuitableError or a RuntimeError, which torch also
    raises when memory runs out.

    It is a class, since from Python 3.12 on `contextmanager` keeps the error, and so the provider's tensors.
    """

    def __init__(self, names: Iterable[str], leave_out: LeaveOut) -> None:
        self._names, self._leave_out = names, leave_out

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> bool:
        if isinstance(error, UnsuitableError):
            text = str(error)
        elif isinstance(error, RuntimeError):
            text = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
        else:
            return False
        for name in self._names:
            self._leave_out(name, text)
        return True


def _rows(benchmark: Benchmark, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
    point = {"benchmark": benchmark.name, "setting": case.setting, "x": case.x}
    return summarize(rounds, point, {**case.columns, **machine_columns(benchmark.torch_device)})


def _summary(title: str, remarks: Sequence[Remark]) -> list[str]:
    """Format each remark on a provider once, with the case or the number of cases that it is about."""
    cases: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        cases.setdefault((remark.provider, remark.text), []).append(remark.case)
    lines = [
        f"  {provider}: {text} ({where[0] if len(where) == 1 else f'{len(where)} settings'})"
        for (provider, text), where in cases.items()
    ]
    return [f"\n{title}:", *lines] if lines else []


def _partial(path: Path) -> Path:
    """Return the path of the rows until the sweep is done."""
    return path.with_name(f"{path.name}.partial")


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {str(out.parent)!r}")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out: nothing may be written to the folder {str(out.parent)!r}")
    for file in (out, out.with_suffix(".png"), _partial(out)):
        if file.is_dir():
            raise FileExistsError(f"--out: {file} is a folder; it stays as it is")
        if file.exists() and not overwrite:
            raise FileExistsError(f"--out: {file} exists; --overwrite replaces it")
