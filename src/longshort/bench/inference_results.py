"""What the benchmarks of inference share: rows, a sweep over lengths, who is measured with whom, a table."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import transformers

from longshort.bench.attention_providers import UnsuitableError, first_line
from longshort.bench.benchmarking import (
    Remark,
    check_out,
    csv_rows,
    five_digits,
    machine_name,
    processor_name,
    stopwatch,
    summary,
)
from longshort.bench.inference_providers import local_windows, prepare_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from longshort.bench.inference_providers import Provider
    from longshort.bench.inference_settings import InferenceSettings


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider at one length: what every benchmark of inference tells. A row of its CSV.

    Attributes:
        provider: one of `PROVIDERS`.
        length, batch, dtype, threads, device, preset, layers, heads: the setting.
        global_heads: of `ls`, all layers together.
        window: of its local heads; None if there are none, or several windows.
        parameters: of this provider.
        torch_version, transformers_version, capability, processor: of the machine; the capability is the
            CPU's vector instructions as torch uses them.
        accelerator: name of the GPU; None on a CPU.
    """

    provider: str
    length: int
    batch: int
    dtype: str
    threads: int
    device: str
    preset: str
    layers: int
    heads: int
    global_heads: int
    window: int | None
    parameters: int
    torch_version: str
    transformers_version: str
    capability: str
    processor: str
    accelerator: str | None


AnyRow = TypeVar("AnyRow", bound=Row)
AnyTurn = TypeVar("AnyTurn", bound="Turn")


def common_columns(settings: InferenceSettings, name: str, length: int, parameters: int) -> dict[str, Any]:
    """The fields of `Row`, all of them."""
    config = settings.config()
    windows = local_windows(config)
    on_gpu = settings.device == "cuda"
    return {
        "provider": name,
        "length": length,
        "batch": settings.batch,
        "dtype": settings.dtype,
        "threads": settings.num_threads,
        "device": settings.device,
        "preset": settings.preset,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "global_heads": sum(len(layout.global_heads) for layout in config.head_layouts()),
        "window": windows[0] if len(windows) == 1 else None,
        "parameters": parameters,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name() if on_gpu else None,
    }


@dataclass(frozen=True)
class InferenceResults(Generic[AnyRow]):
    """What a benchmark found.

    Attributes:
        rows: what was measured.
        skipped: why the others, or a part, were not: remarks on a provider at a length.
    """

    rows: list[AnyRow]
    skipped: list[Remark]


class Column(NamedTuple):
    """A column of a table: its title, the field of the row, and the field's format."""

    title: str
    field: str
    form: str
    scale: float = 1.0


def as_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Lines of a table, its header first; None is left blank."""
    widths = [max(10, len(column.title) + 2) for column in columns]
    titles = "".join(f"{column.title:>{width}}" for column, width in zip(columns, widths, strict=True))
    lines = [f"  {'provider':<10}{titles}"]
    for row in rows:
        cells = []
        for column, width in zip(columns, widths, strict=True):
            value = getattr(row, column.field)
            text = "" if value is None else format(value * column.scale, column.form)
            cells.append(f"{text:>{width}}")
        lines.append(f"  {row.provider:<10}{''.join(cells)}")
    return lines if rows else []


def measure_sweep(
    settings: InferenceSettings,
    kind: type[AnyRow],
    measure: Callable[[int, list[Remark]], list[AnyRow]],
    describe: Callable[[list[AnyRow]], list[str]],
    plot: Callable[[list[AnyRow], Path], None],
    show: Callable[[str], None],
) -> InferenceResults[AnyRow]:
    """Measures each length, and writes `settings.out` and its plot if it is given.

    torch's number of threads is set, and restored.

    Args:
        settings: what to measure.
        kind: of the rows.
        measure: gives the rows of a length, and adds remarks on what it left out to the list.
        describe: lines of text on the rows of a length.
        plot: draws all rows.
        show: takes lines of text as they come.

    Raises:
        FileExistsError: a file of `settings.out` exists and `overwrite` is not set, or is a folder.
        FileNotFoundError: there is no folder for it.
        ValueError: nothing was measured.
    """
    if settings.out is not None:
        check_out(settings.out, settings.overwrite)
    results: InferenceResults[AnyRow] = InferenceResults([], [])
    columns = [field.name for field in fields(kind)]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)
    try:
        show(machine_name())
        with csv_rows(settings.out, columns) if settings.out else nullcontext(lambda _row: None) as write:
            for length in settings.sweep():
                show(f"\n{settings.describe(length)}")
                rows = measure(length, results.skipped)
                for line in describe(rows):
                    show(line)
                for row in rows:
                    write(asdict(row))
                results.rows.extend(rows)
            for line in summary("not measured", results.skipped):
                show(line)
            if not results.rows:
                reasons = "; ".join(dict.fromkeys(remark.text for remark in results.skipped))
                raise ValueError(f"nothing was measured: {reasons}")
    finally:
        torch.set_num_threads(threads_before)
    if settings.out is not None:
        picture = settings.out.with_suffix(".png")
        plot(results.rows, picture)
        show(f"\nnumbers: {settings.out}\nplot:    {picture}")
    return results


def suitable_providers(
    settings: InferenceSettings, setting: str, skipped: list[Remark], room: int = 0
) -> dict[str, Provider]:
    """The providers of the settings by name; remarks on those that cannot serve them go into the list."""
    config = settings.config(room)
    providers = {}
    for name in dict.fromkeys(settings.providers):
        try:
            providers[name] = prepare_provider(name, config)
        except UnsuitableError as error:
            skipped.append(Remark(name, setting, str(error)))
    return providers


def take_turns(
    names: Iterable[str], need: Callable[[Sequence[str]], float], together: float, alone: float
) -> list[list[str]]:
    """Who is in memory at once, and so measured in turns.

    All, if they fit together; else `ls` and `mhsa`, and the others as they fit.

    Args:
        names: of providers.
        need: bytes that some of them take together.
        together: bytes that a group may take.
        alone: bytes that one may take, or ls and mhsa; those that take more are in no group.
    """
    fitting = [name for name in names if need([name]) <= alone]
    if need(fitting) <= together:
        return [fitting] if fitting else []
    pair = [name for name in ("ls", "mhsa") if name in fitting]
    groups = [pair] if len(pair) == 2 and need(pair) <= alone else []
    for name in fitting:
        if groups and name in groups[0]:
            continue
        if groups and need([*groups[-1], name]) <= together:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


class Models:
    """The models that are in memory, kept from one group to the next where they are wanted again."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._built: dict[str, PreTrainedModel] = {}

    def keep(self, names: Sequence[str]) -> None:
        """Give up the models of other names."""
        self._built = {name: model for name, model in self._built.items() if name in names}
        gc.collect()

    def of(self, provider: Provider) -> PreTrainedModel:
        """Its model, built unless it was kept."""
        if provider.name not in self._built:
            built = provider.build(self._settings.torch_device, self._settings.torch_dtype)
            self._built[provider.name] = built
        return self._built[provider.name]


def groups_in_memory(
    providers: Mapping[str, Provider],
    need: Callable[[Sequence[str]], float],
    limits: tuple[float, float],
    setting: str,
    skipped: list[Remark],
) -> list[list[str]]:
    """The groups of `take_turns`; remarks on the providers in none of them go into the list.

    Args:
        providers: by name.
        need: bytes that some of them take together.
        limits: bytes that a group may take, and one alone.
        setting, skipped: for the remarks.
    """
    groups = take_turns(providers, need, *limits)
    for name in providers:
        if not any(name in group for group in groups):
            taken, allowed = need([name]) / 2**30, limits[1] / 2**30
            text = f"takes about {taken:.3g} GiB, {allowed:.3g} are allowed; see --max-memory-gib"
            skipped.append(Remark(name, setting, text))
    return groups


class Turn(Protocol):
    """What a provider does while the others wait."""

    def take_turn(self, counts: bool) -> None:
        """Do it, and keep the time if it counts."""
        ...


@contextmanager
def failures_told(names: Iterable[str], setting: str, skipped: list[Remark]) -> Iterator[None]:
    """Makes of a RuntimeError, with which torch also says that memory is out, a remark on these providers."""
    try:
        yield
    except RuntimeError as error:
        skipped.extend(Remark(name, setting, f"failed: {first_line(error)}") for name in names)


def run_rounds(turns: dict[str, AnyTurn], rounds: int, setting: str, skipped: list[Remark]) -> None:
    """One round that warms up, and those that count; in each all providers take their turn.

    Args:
        turns: by provider; those that fail are taken out, so that their memory is free for the others.
        rounds: that count.
        setting, skipped: for remarks on providers that fail, as without memory.
    """
    for number in range(rounds + 1):
        for name in list(turns):
            with failures_told([name], setting, skipped):
                turns[name].take_turn(counts=number > 0)
                continue
            del turns[name]


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one run, a GPU's work included."""

    def finish() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return stopwatch(finish)[1]


def median_ratio(numerators: Sequence[float] | None, denominators: Sequence[float]) -> float | None:
    """Median over rounds of the ratio; None without numerators."""
    if numerators is None:
        return None
    return five_digits(np.median(np.array(numerators) / np.array(denominators)))
