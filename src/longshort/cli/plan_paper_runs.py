"""`longshort plan --paper-runs`: the commands of the paper's trainings, and what they would take."""

from __future__ import annotations

import json
import shlex
import textwrap
from dataclasses import asdict, dataclass

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.cli.plan_training import as_content
from longshort.cli.rates import RateFlags
from longshort.cli.tables import plain_table
from longshort.cli.units import format_bytes, format_count, format_seconds
from longshort.model.scaling import TrainingPlan, Weights, plan_training
from longshort.reporting.console import console
from longshort.training.paper_runs import PaperRun, paper_runs

_DESCRIPTION = """Print the commands of the paper's trainings, and what each would take on the GPUs that it is
planned for. Nothing is run; the times follow from rates that the flags assume.
"""
_WIDTH = 96


@dataclass(frozen=True, kw_only=True)
class PaperRunsFlags(RateFlags):
    paper_runs: bool = False
    """Print them."""

    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(PaperRunsFlags, "plan", arguments, _DESCRIPTION)
    plans = [(one, _plan(one, flags)) for one in paper_runs()]
    if flags.json:
        content = [{"command": one.command(), **as_content(plan)} for one, plan in plans]
        rates = {name: asdict(flags.rates(name)) for name in ("bf16", "fp32")}
        print(json.dumps({"rates": rates, "runs": content}, indent=2))
        return 0
    table = plain_table("run", "parameters", "GPUs", "memory", "FLOPs/step", "sent/step", "step", "GPU hours")
    for one, plan in plans:
        setup = plan.setup
        hours = one.settings["steps"] * plan.time.total * setup.ranks / 3600
        table.add_row(
            one.name,
            format_count(plan.parameters),
            f"{setup.data_ranks} × {setup.context_parallel}",
            format_bytes(plan.memory.total),
            format_count(plan.flops.total),
            format_bytes(round(plan.traffic.total)),
            format_seconds(plan.time.total),
            f"{hours:,.1f}",
        )
    output = console()
    output.print(table)
    output.print(f"\n{flags.describe('bf16', 'fp32')}", markup=False)
    for one, _ in plans:
        output.print(f"\n{_wrapped(one.command())}", markup=False)
    return 0


def _plan(one: PaperRun, flags: PaperRunsFlags) -> TrainingPlan:
    setup = one.setup()
    return plan_training(one.name, setup, flags.rates(setup.precision), Weights.of(setup.config))


def _wrapped(command: str) -> str:
    """Break a command into lines that a shell joins, none of them between a flag and its value."""
    words: list[str] = []
    for word in shlex.split(command):
        is_value = words and words[-1].startswith("-") and " " not in words[-1] and not word.startswith("-")
        quoted = word if word.startswith("$") else shlex.quote(word)
        if is_value:
            words[-1] += f" {quoted}"
        else:
            words.append(quoted)
    lines = textwrap.wrap(
        " ".join(word.replace(" ", "\0") for word in words), _WIDTH, subsequent_indent="    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return " \\\n".join(lines).replace("\0", " ")
