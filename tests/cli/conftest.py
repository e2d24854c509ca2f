"""A small corpus, its tokens and a trained run, made once by the commands themselves."""

import shutil

import pytest

from longshort.cli import main

SHAPE = [
    "--sequence-length", "32", "--batch-size", "2", "--layers", "1", "--hidden-size", "16", "--heads", "2",
    "--head-dim", "8", "--window", "4",
]  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        words = [f"word{(number * 7 + index) % 23}" for index in range(40)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    assert main(["data", str(corpus), "--out", str(folder), "--validation-fraction", "0.3"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """Read it, do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "tiny", "--data", str(data), "--out", str(folder), "--steps", "12", *SHAPE]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run."""
    return shutil.copytree(trained, tmp_path / "run")
