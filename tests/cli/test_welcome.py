import errno
import json
import os
import shlex
from pathlib import Path

import pytest

from longshort.cli import COMMANDS, main


@pytest.fixture
def welcome(tmp_path, monkeypatch, capsys):
    """Calls `longshort` in the folder tmp_path; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def call():
        capsys.readouterr()
        assert main([]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return call


def make_data(folder):
    folder.mkdir(parents=True)
    for name in ("train.bin", "train.json", "validation.bin", "validation.json"):
        (folder / name).touch()


def make_run(folder, steps, *saved):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"training": {"steps": steps}}))
    for step in saved:
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (folder / "checkpoints" / ".step-900.partial").mkdir(parents=True, exist_ok=True)


def commands(text):
    return [line.strip() for line in text.splitlines() if line.startswith("  longshort ")]


def test_an_empty_folder_gets_the_first_steps(welcome):
    shown = welcome()
    assert shown.startswith("usage: longshort COMMAND")
    assert all(name in shown for name in COMMANDS)
    assert "longshort data stdlib --out runs/data " in shown
    assert "longshort demo --out runs/demo" in shown


@pytest.mark.parametrize("place", ["tokens", "runs/tokens", "my text"])
def test_data_gets_the_training(welcome, tmp_path, place):
    make_data(tmp_path / place)
    assert commands(welcome()) == [f"longshort train tiny --data {shlex.quote(place)} --out runs/first"]


def test_a_locked_folder_is_passed_over(welcome, tmp_path, monkeypatch):
    make_data(tmp_path / "a")
    make_data(tmp_path / "tokens")
    stat = os.stat

    def locked(path, *arguments, **options):
        if Path(os.fsdecode(path)).absolute().parent == tmp_path / "a":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", locked)
    assert commands(welcome()) == ["longshort train tiny --data tokens --out runs/first"]


def test_an_unfinished_run_is_resumed_or_used(welcome, tmp_path):
    make_data(tmp_path / "data")
    make_run(tmp_path / "runs" / "ls", 300, 100, 200)
    shown = welcome()
    assert "the run runs/ls, of which 200 of 300 steps are saved" in shown
    assert commands(shown) == [
        "longshort train --resume runs/ls",
        "longshort evaluate runs/ls",
        'longshort generate runs/ls --prompt "def "',
    ]


def test_a_run_without_a_checkpoint_can_only_be_resumed(welcome, tmp_path):
    make_run(tmp_path / "ls", 300)
    assert commands(welcome()) == ["longshort train --resume ls"]


def test_a_finished_run_is_used(welcome, tmp_path):
    make_run(tmp_path / "ls", 300, 300)
    assert [command.split()[1] for command in commands(welcome())] == ["evaluate", "generate"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"training": 3}', '{"training": {"steps": "x"}}', "\x00"]
)
def test_another_config_is_no_run(welcome, tmp_path, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    assert "first steps" in welcome()


def test_the_named_commands_work(welcome, tmp_path, data, trained):
    """The folders that the commands write are recognised."""
    (tmp_path / "text").symlink_to(data)
    assert commands(welcome()) == ["longshort train tiny --data text --out runs/first"]
    (tmp_path / "trained").symlink_to(trained)
    shown = welcome()
    assert "the run trained, of which 12 of 12 steps are saved" in shown
    assert main([*shlex.split(commands(shown)[1])[1:], "--max-new-tokens", "2"]) == 0
