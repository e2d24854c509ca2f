"""`longshort bench`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from longshort.cli.console import console
from longshort.cli.errors import UsageError
from longshort.cli.flags import parse

if TYPE_CHECKING:
    from collections.abc import Callable

_BENCHMARKS = {
    "attention": "Time attention: backends of this library against PyTorch's and others'.",
    "prefill": "Time a prompt's way through whole models, beside the bound that Amdahl's law sets.",
    "decode": "Time each token after a long context.",
    "memory": "Measure what a prompt adds to the peak of memory.",
}
_HELP = """\
usage: longshort bench BENCHMARK [flags]

Measure speed and memory on this machine.

benchmarks:
{benchmarks}

`longshort bench BENCHMARK --help` explains one.
""".format(benchmarks="\n".join(f"  {name:<11}{text}" for name, text in _BENCHMARKS.items()))


def run(arguments: list[str]) -> int:
    if not arguments:
        print(_HELP, end="", file=sys.stderr)
        return 2
    benchmark, *rest = arguments
    if benchmark in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if benchmark not in _BENCHMARKS:
        raise UsageError(f"there is no benchmark {benchmark!r}; the benchmarks are {', '.join(_BENCHMARKS)}")
    output = console()
    _RUN[benchmark](rest, lambda text: output.print(text, markup=False))
    return 0


def _attention(arguments: list[str], show: Callable[[str], None]) -> None:
    from longshort.bench.attention_speed import measure_attention
    from longshort.bench.speed_settings import SpeedSettings

    measure_attention(parse(SpeedSettings, "bench attention", arguments), show)


def _prefill(arguments: list[str], show: Callable[[str], None]) -> None:
    from longshort.bench.inference_prefill import measure_prefill
    from longshort.bench.inference_settings import PrefillSettings

    measure_prefill(parse(PrefillSettings, "bench prefill", arguments), show)


def _decode(arguments: list[str], show: Callable[[str], None]) -> None:
    from longshort.bench.inference_decode import measure_decode
    from longshort.bench.inference_settings import DecodeSettings

    measure_decode(parse(DecodeSettings, "bench decode", arguments), show)


def _memory(arguments: list[str], show: Callable[[str], None]) -> None:
    from longshort.bench.inference_memory import measure_memory
    from longshort.bench.inference_settings import MemorySettings

    measure_memory(parse(MemorySettings, "bench memory", arguments), show)


_RUN = {"attention": _attention, "prefill": _prefill, "decode": _decode, "memory": _memory}
