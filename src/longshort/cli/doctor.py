"""The command `longshort doctor`, which needs no extra, since it reports missing ones."""

from __future__ import annotations

import json

from longshort.cli.errors import UsageError

_HELP = """\
usage: longshort doctor [--json]

Show versions, hardware, and which attention backends work here.

--json: print it for programs, without names of users, machines and folders
"""


def run(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    if arguments not in ([], ["--json"]):
        raise UsageError(f"doctor takes no flags but --json, got {' '.join(arguments)}")
    from longshort.doctor import as_text, facts, report

    print(json.dumps(facts(), indent=2) if arguments else as_text(report()))
    return 0
