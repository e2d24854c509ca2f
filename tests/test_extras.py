"""What is said where an optional package is missing, by the library and by the commands."""

import json
import subprocess
import sys

import pytest

from longshort.cli import COMMANDS
from longshort.extras import OPTIONAL_PACKAGES, MissingPackageError, install_command, require

TRY = """
import contextlib, importlib, io, json, os, sys
import torch, transformers, numpy, matplotlib.figure, tyro, rich.console

def try_without(package, code):
    '''Return what the code raises or prints in a new process where this package cannot be imported.'''
    ours, theirs = os.pipe()
    if os.fork() == 0:
        for name in [name for name in sys.modules if name.partition('.')[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                exec(code)
        except ModuleNotFoundError as error:
            said.write(f'{type(error).__name__} {error.name}: {error}')
        except BaseException as error:
            said.write(repr(error))
        os.write(theirs, said.getvalue().encode())
        os._exit(0)
    os.close(theirs)
    os.wait()
    return os.fdopen(ours).read()

print(json.dumps([try_without(*case) for case in json.loads(sys.argv[1])]))
"""
HF, TRAIN = "pip install 'longshort[hf]'", "pip install 'longshort[train]'"
LIBRARY = [
    ("transformers", "import longshort.model", f"longshort.model needs transformers: {HF}"),
    ("safetensors", "import longshort.model", f"longshort.model needs safetensors: {HF}"),
    ("transformers", "import longshort.huggingface", f"longshort.huggingface needs transformers: {HF}"),
    ("tokenizers", "from longshort.data import prepare", f"longshort.data needs tokenizers: {TRAIN}"),
    ("numpy", "import longshort.data", f"longshort.data needs numpy: {TRAIN}"),
    ("numpy", "import longshort.evaluation", f"longshort.evaluation needs numpy: {TRAIN}"),
    ("annotated_types", "import longshort.training.loop",
     f"longshort.training needs annotated-types: {TRAIN}"),
    ("jinja2", "import longshort.training.report", f"longshort.training needs jinja2: {TRAIN}"),
    ("matplotlib", "import longshort.conversion", f"longshort.conversion needs matplotlib: {TRAIN}"),
    ("scipy", "import longshort.studies.catalogue", f"longshort.studies needs scipy: {TRAIN}"),
    (
        "datasets",
        "from longshort.data import open_corpus; open_corpus('hf:no/such')",
        f"source 'hf:no/such' needs datasets: {TRAIN}",
    ),
]  # fmt: skip


def said_without(cases: list[tuple[str, str]]) -> list[str]:
    command = [sys.executable, "-c", TRY, json.dumps(cases)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_library_names_the_command_that_installs_what_is_missing() -> None:
    said = said_without([(package, code) for package, code, _ in LIBRARY])
    assert said == [f"MissingPackageError {package}: {message}" for package, _, message in LIBRARY]


def test_commands_name_the_command_that_installs_what_is_missing() -> None:
    """All parse their flags with tyro; the doctor, which reports missing packages, needs none."""
    calls = [("tyro", [name, "x"]) for name in COMMANDS if name not in ("bench", "doctor")]
    calls += [
        ("tyro", ["bench", "attention"]),
        ("rich", ["data", "--out", "x"]),
        ("annotated_types", ["data"]),
    ]
    said = said_without(
        [(package, f"from longshort.cli import main; main({call})") for package, call in calls]
    )
    expected = [
        f"longshort: error: this needs {package.replace('_', '-')}: {TRAIN}\n" for package, _ in calls
    ]
    assert said == expected


@pytest.mark.parametrize("package", sorted(OPTIONAL_PACKAGES))
def test_every_optional_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    module = package.replace("-", "_")
    command = f"pip install 'longshort[{OPTIONAL_PACKAGES[package]}]'"
    assert install_command(f"{module}.part") == command
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError) as caught:
        require("this", "torch", package)
    assert str(caught.value) == f"this needs {package}: {command}"
    assert caught.value.name == module


def test_other_modules_have_no_command() -> None:
    assert install_command("os") is None
    assert install_command("") is None
