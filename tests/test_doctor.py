import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from longshort import __version__, doctor
from longshort.attention import BACKENDS
from longshort.backends import cpu
from longshort.extras import OPTIONAL_PACKAGES


def sections() -> dict[str, dict[str, str]]:
    return {title: dict(rows) for title, rows in doctor.report()}


def test_versions_are_those_that_run() -> None:
    versions = sections()["Versions"]
    assert versions["longshort"] == __version__
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == metadata.version("transformers")


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions = sections()["Versions"]
    assert versions["transformers"] == "not installed: pip install 'longshort[hf]'"
    assert versions["tyro"] == "not installed: pip install 'longshort[train]'"


def test_every_optional_package_is_listed_under_the_extra_that_brings_it() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {
        requirement.split(">=")[0]: extra
        for extra in ("hf", "train", "examples", "notebook")
        for requirement in project["optional-dependencies"][extra]
        if not requirement.startswith("longshort")
    }
    assert declared == OPTIONAL_PACKAGES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend_is_chosen_or_has_a_reason(dtype: str) -> None:
    backends = sections()[f"Backends for cpu, {dtype}"]
    assert set(backends) == set(BACKENDS)
    assert [name for name, text in backends.items() if text.startswith("chosen")] == ["cpu"]
    assert backends["reference"] == "not chosen: slower than cpu"


def test_unsupported_backend_shows_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "supports", lambda call: "needs a sunny day")
    backends = sections()["Backends for cpu, float32"]
    assert backends["blockwise"].startswith("chosen")
    assert backends["cpu"] == "not chosen: needs a sunny day"


def test_processor_row_shows_the_threads_in_use() -> None:
    processor = sections()["Processor"]
    assert processor["threads"].startswith(f"{torch.get_num_threads()} ")
    assert processor["vector instructions"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("cuda", "hip", "reason"),
    [
        (None, None, f"torch {torch.__version__} is built without GPU support"),
        ("13.0", None, "torch is built for CUDA 13.0, but no driver or no device is visible"),
        (None, "7.0", "torch is built for ROCm 7.0, but no driver or no device is visible"),
    ],
)
def test_no_gpu_says_why(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert sections()["GPU"] == {"none": reason}


def test_a_broken_gpu_is_a_finding_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def broken(*size: int, device: str, dtype: torch.dtype) -> torch.Tensor:
        if device == "cuda":
            raise RuntimeError("CUDA error: out of memory")
        return torch.ones(size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", broken)
    assert sections()["Backends for cuda, bfloat16"] == {
        "none": "cuda cannot be used: CUDA error: out of memory"
    }


def test_text_has_every_row_aligned() -> None:
    report = doctor.report()
    lines = doctor.as_text(report).splitlines()
    rows = [(name, text) for _, rows in report for name, text in rows]
    column = 4 + max(len(name) for name, _ in rows)
    for name, text in rows:
        assert any(line.startswith(f"  {name}") and line[column:] == text for line in lines)


def test_kernels_row_shows_the_build_in_use() -> None:
    assert f"built; {cpu.instruction_set()} in use" in sections()["Processor"]["C++ kernels"]


@pytest.mark.parametrize(
    ("compiler", "advice"), [(None, "apt install g++"), ("/bin/c++", "/bin/c++ is here")]
)
def test_missing_kernels_come_with_advice(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, advice: str
) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "the C++ kernels are not built")
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    row = sections()["Processor"]["C++ kernels"]
    assert row.startswith("the C++ kernels are not built")
    assert advice in row


def test_facts_name_missing_packages_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def missing(name: str) -> str:
        if name in ("rich", "transformers", "tyro"):
            raise metadata.PackageNotFoundError(name)
        return installed(name) if name == "numpy" else "1.0"  # the others need not be here

    monkeypatch.setattr(metadata, "version", missing)
    found = doctor.facts()
    assert found["missing_extras"] == {"hf": ["transformers"], "train": ["tyro", "rich"]}
    assert found["packages"]["rich"] is None
    assert found["packages"]["numpy"] == installed("numpy")


@pytest.mark.parametrize("home", ["/house/ada", "/"])
@pytest.mark.parametrize(
    ("reason", "left"),
    [
        ("the kernels in /house/ada/lib/x.so do not load", "the kernels in x.so do not load"),
        ("no '/house/one/x-1.so': a/b and 1/2 stay", "no 'x-1.so': a/b and 1/2 stay"),
        ("/srv/cache/torch/ is full (/srv/x.cpp:23)", "torch/ is full (x.cpp:23)"),
        (r"C:\ada\lib\x.dll, D:/ada/lib/y.dll, ~/lib/y.so", "x.dll, y.dll, y.so"),
        ("-I/house/bob/include -L/house/ada/lib/own /house//bob/z.so", "-Iinclude -Lown z.so"),
        ("/house/ada-2/x.so and /house/ada.old/y.so", "x.so and y.so"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_facts_leave_out_folders(monkeypatch: pytest.MonkeyPatch, home: str, reason: str, left: str) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(cpu, "missing", lambda: reason)
    assert doctor.facts()["kernels"]["reason"] == left


def test_facts_leave_out_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/house/ada king")
    monkeypatch.setattr(cpu, "missing", lambda: "/house/ada king/x.so, /house/ada king: not found")
    assert doctor.facts()["kernels"]["reason"] == "~/x.so, ~: not found"


def test_facts_and_report_name_the_same_backends() -> None:
    for backend in doctor.facts()["backends"]:
        rows = sections()[f"Backends for {backend['device']}, {backend['dtype']}"]
        assert rows[backend["chosen"]].startswith("chosen")
        assert {name for name, text in rows.items() if text.startswith("not")} == set(backend["not_chosen"])


def test_facts_of_a_broken_gpu_have_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cases", lambda: [("cuda", torch.bfloat16)])

    def broken(*_arguments: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(doctor, "_explain", broken)
    (backend,) = doctor.facts()["backends"]
    assert backend["chosen"] is None
    assert backend["error"] == "CUDA error: out of memory"
