"""What shells complete, by the shells themselves."""

import os
import re
import shutil
import subprocess
from typing import Any

import pexpect
import pytest

from longshort.cli import COMMANDS, main
from longshort.cli.bench import BENCHMARKS
from longshort.cli.completion import command_parser

CASES = {
    "longshort tra": {"train"},
    "longshort train --position-embedding ": {"learned", "rope", "alibi", "none"},
    "longshort train tiny --dev": {"--device"},
    "longshort train tiny --no-t": {"--no-tensorboard"},
    "longshort train --resu": {"--resume"},
    "longshort train t": {"tiny"},
    "longshort evaluate --data tex": {"text/", "text.json"},
    "longshort evaluate tex": {"text/", "text.json"},
    "longshort bench dec": {"decode"},
    "longshort bench decode --prov": {"--providers"},
    "longshort study rem": {"remedies"},
    "longshort doctor --j": {"--json"},
    "longshort completion z": {"zsh"},
}
"""What may stand at the end of each line, in a folder that holds text/ and text.json."""


def has(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Gives the path of the script for a shell."""
    folder = tmp_path_factory.mktemp("completion")

    def write(shell):
        with pytest.MonkeyPatch.context() as patch, (folder / f"longshort.{shell}").open("w") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
        return folder / f"longshort.{shell}"

    return write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text.json").touch()
    return tmp_path


def run(*command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout


@has("bash")
def test_bash_completes(script, folder):
    complete = """
        source "$1"
        function=$(complete -p longshort | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        while IFS= read -r COMP_LINE; do
            read -ra COMP_WORDS <<< "$COMP_LINE"
            [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_POINT=${#COMP_LINE} COMPREPLY=()
            "$function" longshort "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2> /dev/null
            echo "${COMPREPLY[*]}"
        done <<< "$2"
    """
    shown = run("bash", "-c", complete, "bash", script("bash"), "\n".join(CASES), folder=folder)
    found = [{word.rstrip("/") for word in line.split()} for line in shown.splitlines()]
    assert found == [{word.rstrip("/") for word in words} for words in CASES.values()]


@has("fish")
def test_fish_completes(script, folder):
    for line, words in CASES.items():
        shown = run(
            "fish", "--no-config", "-c", f"source {script('fish')}; complete -C '{line}'", folder=folder
        )
        assert {entry.partition("\t")[0] for entry in shown.splitlines()} == words, line


@has("zsh")
def test_zsh_completes(script, folder):
    functions = folder / "functions"
    functions.mkdir()
    shutil.copy(script("zsh"), functions / "_longshort")
    shell = pexpect.spawn("zsh", ["-f", "-i"], cwd=folder, encoding="utf-8", timeout=60, dimensions=(50, 200))
    shell.sendline(f"PS1='READY''> '; fpath+=({functions}); autoload -U compinit; compinit -u -D")
    shell.expect_exact("READY> ")
    for line, words in CASES.items():
        shell.send(f"{line}\t")
        typed, _, last = line.rpartition(" ")
        common = os.path.commonprefix([*words])  # noqa: RUF071  # of words, not of paths
        if common != last:
            shell.expect_exact(f"{typed} {common}")
        else:  # nothing to add; the words are listed
            shell.expect_exact(min(words))
        shell.send("\x15")
    shell.close(force=True)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"bench {name}" for name in BENCHMARKS)])
def test_all_flags_of_the_help_are_completed_and_no_others(command, capsys):
    parser: Any = command_parser()
    for name in command.split():
        (choices,) = [action.choices for action in parser._actions if action.nargs == "A..."]
        parser = choices[name]
    others = {"train": ["--resume=x"], "plan": ["--ranks", "--paper-runs"]}.get(command, [])
    documented = set()
    for flags in ([], *([flag] for flag in others)):
        assert main([*command.split(), *flags, "--help"]) == 0
        # Each flag starts a line of the help.
        documented |= set(re.findall(r"^[ │]*(--[a-z][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE))
    completed = {option for action in parser._actions for option in action.option_strings}
    assert completed - {"-h", "--help"} == documented - {"--help"}
