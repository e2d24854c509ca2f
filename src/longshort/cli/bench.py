"""The command `longshort bench`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from longshort.cli.errors import UsageError
from longshort.cli.flags import parse
from longshort.reporting.console import console

BENCHMARKS = {
    "attention": "Time attention: backends of this library against PyTorch's and others'.",
    "kernel": "Time the attention of one query against long caches.",
    "kernels": "Compile the kernels for GPUs and show their registers, or search the fastest tiles.",
    "prefill": "Time whole models that read a prompt, with the bound by Amdahl's law.",
    "decode": "Time each token after a long context.",
    "memory": "Measure how much a prompt adds to the peak of memory.",
    "monitor": "Time training steps with and without the attention monitor.",
    "projection": "Time linear layers that multiply a few tokens.",
}
"""The description of each benchmark, by its name, which is also its module in longshort.bench."""

_HELP = """\
usage: longshort bench BENCHMARK [flags]

Measure speed and memory on this machine.

benchmarks:
{benchmarks}

`longshort bench BENCHMARK --help` explains one.
""".format(benchmarks="\n".join(f"  {name:<12}{text}" for name, text in BENCHMARKS.items()))


def run(arguments: list[str]) -> int:
    if not arguments:
        print(_HELP, end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name!r}; the benchmarks are {', '.join(BENCHMARKS)}")
    from longshort.bench.sweep import measure

    flags, output = parse(benchmark_kind(name), f"bench {name}", rest), console()

    def show(text: str) -> None:
        output.print(text, markup=False)

    if name == "kernels":  # compares no providers
        flags.run(show)
    else:
        measure(flags, show)
    return 0


def benchmark_kind(name: str) -> Any:
    """Return the class of a benchmark, whose fields are its flags."""
    return getattr(import_module(f"longshort.bench.{name}"), f"{name.capitalize()}Benchmark")
