"""`longshort bench`"""

from __future__ import annotations

import sys

from longshort.cli.console import console
from longshort.cli.errors import UsageError
from longshort.cli.flags import parse

_BENCHMARKS = {
    "attention": "Time attention: backends of this library against PyTorch's and others'.",
}
_HELP = """\
usage: longshort bench BENCHMARK [flags]

Measure speed on this machine.

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
    return _attention(rest)


def _attention(arguments: list[str]) -> int:
    from longshort.evaluation.attention_speed import measure_attention
    from longshort.evaluation.speed_settings import SpeedSettings

    settings = parse(SpeedSettings, "bench attention", arguments)
    output = console()
    measure_attention(settings, show=lambda text: output.print(text, markup=False))
    return 0
