"""Speed of attention on this CPU: provider × length × layout × dtype × threads × pass.

The providers of a setting take turns: each round runs each of them once, so that what else the machine does
meets all alike. The first round warms up. Reported are medians over the other rounds; comparisons with the
baseline are medians of the rounds' own ratios.

GFLOP/s count the work on visible pairs alone, as if nothing else were computed: 4·head_dim operations a pair
forward (two products), 14·head_dim forward and backward (seven), of the pairs that the provider's layout has.
Their share of the machine's peak, which is measured in the same rounds, compares across machines.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from longshort.bench.attention_providers import (
    BASELINE,
    Problem,
    UnsuitableError,
    first_line,
    prepare,
)
from longshort.bench.benchmarking import (
    Remark,
    check_out,
    csv_rows,
    five_digits,
    machine_name,
    measure_peak,
    processor_name,
    stopwatch,
    summary,
)
from longshort.bench.speed_settings import DTYPES, PASSES, Setting, SpeedSettings, count_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from longshort.bench.attention_providers import Kernel


@dataclass(frozen=True)
class Row:
    """One provider in one setting and pass. A row of the CSV, whose columns are these fields.

    Attributes:
        pass_name: one of `PASSES`.
        provider: one of `PROVIDERS`; `sdpa` has every head global, whatever the setting's layout is.
        length, heads, global_heads, window, kv_heads, head_dim, batch, dtype, threads: the setting.
        milliseconds: median of CPU time at one thread, of wall time at more.
        milliseconds_p10, milliseconds_p90: its 10th and 90th percentile.
        wall_milliseconds: median of wall time.
        cpu_milliseconds: median of CPU time; None at more threads than one, where waiting counts too.
        speedup: median over rounds of the baseline's milliseconds / these; None without the baseline.
        visible_pairs: (query, key) pairs that the provider must compute, all heads and sequences together.
        gflops: 1e9 operations per second on them.
        peak_gflops: median peak of the used threads in float32, in the same rounds.
        peak_kind: how it was found: "fma" or "matmul", see `measure_peak`.
        peak_share: gflops / peak_gflops.
        repeats: rounds that counted.
        torch_version, capability, processor: of torch, its vector instructions, and the processor's model.
    """

    pass_name: str
    provider: str
    length: int
    heads: int
    global_heads: int
    window: int | None
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    threads: int
    milliseconds: float
    milliseconds_p10: float
    milliseconds_p90: float
    wall_milliseconds: float
    cpu_milliseconds: float | None
    speedup: float | None
    visible_pairs: int
    gflops: float
    peak_gflops: float
    peak_kind: str
    peak_share: float
    repeats: int
    torch_version: str
    capability: str
    processor: str


@dataclass(frozen=True)
class SpeedResults:
    """What `measure_attention` found.

    Attributes:
        rows: what was measured.
        skipped: why the others were not, a remark for each provider, or pass of one, in a setting.
        notes: a remark for each provider in a setting that has something to tell.
    """

    rows: list[Row]
    skipped: list[Remark]
    notes: list[Remark]


COLUMNS = [field.name for field in fields(Row)]


def measure_attention(
    settings: SpeedSettings, show: Callable[[str], None] = lambda _text: None
) -> SpeedResults:
    """Measures all settings, and writes `settings.out` and its plot if it is given.

    torch's number of threads is set for each setting, and restored.

    Args:
        settings: what to measure.
        show: takes lines of text as they come: the machine, a table for each setting, what was left out.

    Raises:
        FileExistsError: a file of `settings.out` exists and `overwrite` is not set, or is a folder.
        FileNotFoundError: there is no folder for it.
        ValueError: no provider can serve any of the settings.
    """
    if settings.out is not None:
        check_out(settings.out, settings.overwrite)
    results = SpeedResults([], [], [])
    threads_before = torch.get_num_threads()
    try:
        show(_describe_machine(settings.threads))
        with csv_rows(settings.out, COLUMNS) if settings.out else nullcontext(lambda _row: None) as write:
            for setting in settings.sweep():
                show(f"\n{setting}")
                rows = _measure(setting, settings, results)
                for line in _as_table(rows):
                    show(line)
                for row in rows:
                    write(asdict(row))
                results.rows.extend(rows)
            for title, remarks in (("notes", results.notes), ("not measured", results.skipped)):
                for line in summary(title, remarks):
                    show(line)
            if not results.rows:
                raise ValueError("nothing was measured: --providers names none that can serve these settings")
    finally:
        torch.set_num_threads(threads_before)
    if settings.out is not None:
        from longshort.bench.speed_plot import plot_speed

        plot = settings.out.with_suffix(".png")
        plot_speed(results.rows, plot)
        show(f"\nnumbers: {settings.out}\nplot:    {plot}")
    return results


def _describe_machine(threads: Sequence[int]) -> str:
    """One line: torch, its vector instructions, the processor, and its peak right now on so many threads."""
    peaks = []
    for count in dict.fromkeys(threads):
        torch.set_num_threads(count)
        measured = [measure_peak(count) for _ in range(4)][1:]  # the first warms up
        peak = np.median([flops for flops, _ in measured]) / 1e9
        peaks.append(f"{peak:,.0f} GFLOP/s on {count_threads(count)} ({measured[0][1]})")
    return f"{machine_name()}, peak {', '.join(peaks)}"


def _as_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table, its header first: milliseconds, their 10th and 90th percentile, and the rest."""
    times = "".join(f"{name:>10}" for name in ("ms", "10 %", "90 %"))
    shares = "".join(f"{name:>9}" for name in ("speedup", "GFLOP/s", "of peak"))
    lines = [f"  {'provider':<16}{'pass':<17}{times}{shares}"]
    for row in rows:
        times = f"{row.milliseconds:>10.2f}{row.milliseconds_p10:>10.2f}{row.milliseconds_p90:>10.2f}"
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
        shares = f"{speedup:>9}{row.gflops:>9.1f}{row.peak_share:>9.0%}"
        lines.append(f"  {row.provider:<16}{row.pass_name:<17}{times}{shares}")
    return lines if rows else []


class _Task(NamedTuple):
    kernel: Kernel
    run: Callable[[], object]


def _measure(setting: Setting, settings: SpeedSettings, results: SpeedResults) -> list[Row]:
    """Rows of one setting; its remarks go into `results`."""
    torch.set_num_threads(setting.threads)
    tasks = _prepare_tasks(setting, settings, results)
    clocks: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in tasks}
    peaks = []
    for repeat in range(settings.repeats + 1 if tasks else 0):
        for key, task in list(tasks.items()):
            try:
                seconds = stopwatch(task.run)
            except RuntimeError as error:  # so torch also says that memory is out
                provider, pass_name = key
                text = f"{pass_name} failed: {first_line(error)}"
                results.skipped.append(Remark(provider, setting, text))
                del tasks[key], clocks[key]
                continue
            if repeat:  # the first round warms up
                clocks[key].append(seconds)
        peaks.append(measure_peak(setting.threads))
    return [
        _row(setting, settings, key, task.kernel, clocks[key], clocks.get((BASELINE, key[1])), peaks)
        for key, task in tasks.items()
    ]


def _prepare_tasks(
    setting: Setting, settings: SpeedSettings, results: SpeedResults
) -> dict[tuple[str, str], _Task]:
    """By provider and pass what is to be timed, pass by pass."""
    problem, grad_out = _random_problem(setting, settings)
    kernels = {}
    for provider in dict.fromkeys(settings.providers):
        try:
            kernels[provider] = prepare(provider, problem)
        except UnsuitableError as error:
            results.skipped.append(Remark(provider, setting, str(error)))
            continue
        if kernels[provider].note is not None:
            results.notes.append(Remark(provider, setting, kernels[provider].note))

    def forward(kernel: Kernel) -> None:
        with torch.no_grad():
            kernel.run(problem.q, problem.k, problem.v)

    def forward_and_backward(kernel: Kernel) -> None:
        leaves = problem.leaves()
        torch.autograd.grad(kernel.run(*leaves), leaves, grad_out)

    tasks = {}
    for pass_name in dict.fromkeys(settings.passes):
        for provider, kernel in kernels.items():
            if pass_name == "forward":
                tasks[provider, pass_name] = _Task(kernel, partial(forward, kernel))
            elif kernel.no_backward is None:
                tasks[provider, pass_name] = _Task(kernel, partial(forward_and_backward, kernel))
            else:
                results.skipped.append(Remark(provider, setting, f"{pass_name}: {kernel.no_backward}"))
    return tasks


def _random_problem(setting: Setting, settings: SpeedSettings) -> tuple[Problem, Tensor]:
    """The problem, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (settings.batch, heads, setting.length, settings.head_dim)
        return torch.randn(shape, generator=generator).to(DTYPES[setting.dtype])

    layout = setting.layout
    q, k, v = random(layout.num_heads), random(layout.num_kv_heads), random(layout.num_kv_heads)
    return Problem(layout, q, k, v, settings.max_memory_gib * 2**30), random(layout.num_heads)


def _row(
    setting: Setting,
    settings: SpeedSettings,
    key: tuple[str, str],
    kernel: Kernel,
    seconds: Sequence[tuple[float, float]],
    baseline: Sequence[tuple[float, float]] | None,
    peaks: Sequence[tuple[float, str]],
) -> Row:
    """From (CPU, wall) seconds of the rounds, those of the baseline, and (operations per second, kind)."""
    provider, pass_name = key
    layout = setting.layout
    single = setting.threads == 1
    clock = 0 if single else 1
    times = 1e3 * np.array(seconds)  # (repeats, 2)
    p10, median, p90 = np.percentile(times[:, clock], [10, 50, 90])
    speedup = None
    if baseline is not None:
        speedup = five_digits(np.median(1e3 * np.array(baseline)[:, clock] / times[:, clock]))
    pairs = settings.batch * kernel.layout.score_count(setting.length, setting.length)
    gflops = PASSES[pass_name] * settings.head_dim * pairs / median / 1e6
    peak_gflops = np.median([peak for peak, _ in peaks]) / 1e9
    return Row(
        pass_name=pass_name,
        provider=provider,
        length=setting.length,
        heads=layout.num_heads,
        global_heads=len(layout.global_heads),
        window=setting.window,
        kv_heads=layout.num_kv_heads,
        head_dim=settings.head_dim,
        batch=settings.batch,
        dtype=setting.dtype,
        threads=setting.threads,
        milliseconds=five_digits(median),
        milliseconds_p10=five_digits(p10),
        milliseconds_p90=five_digits(p90),
        wall_milliseconds=five_digits(np.median(times[:, 1])),
        cpu_milliseconds=five_digits(np.median(times[:, 0])) if single else None,
        speedup=speedup,
        visible_pairs=pairs,
        gflops=five_digits(gflops),
        peak_gflops=five_digits(peak_gflops),
        peak_kind=peaks[-1][1],
        peak_share=five_digits(gflops / peak_gflops),
        repeats=settings.repeats,
        torch_version=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
        processor=processor_name(),
    )
