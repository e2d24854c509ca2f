"""A model, a text, and the model converted, made once."""

import shutil

import pytest
from tests.conversion.models import random_llama, save_llama

from longshort.cli import main
from longshort.conversion.heads import find_heads
from longshort.conversion.layout_file import write_layouts

WINDOW = 8


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {number} of a text, {number * number} letters\n" for number in range(400)))
    return file


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="session")
def layout(tmp_path_factory):
    """One global head, the second of the second layer."""
    file = tmp_path_factory.mktemp("layouts") / "layout.json"
    heads = find_heads(random_llama())
    write_layouts(file, heads.layouts(heads.candidates[3:4], WINDOW, 2))
    return file


CONVERT = ["--lengths", "32", "64", "9999", "--needle-lengths", "128", "--latency-lengths", "200"]


@pytest.fixture(scope="session")
def converted_once(original, layout, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "converted"
    arguments = ["convert", original, folder, "--layout", layout, "--text", text, *CONVERT]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture
def converted(converted_once, tmp_path):
    """A copy of the converted model."""
    return shutil.copytree(converted_once, tmp_path / "converted")
