"""A report on this machine: versions, processor, GPUs, and which backend serves which tensors."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longshort import __version__
from longshort.attention import Explanation, explain
from longshort.backends import cpu
from longshort.bench.machine import processor_name
from longshort.extras import OPTIONAL_PACKAGES, install_command
from longshort.layout import HeadLayout

Rows = list[tuple[str, str]]
Report = list[tuple[str, Rows]]

_PART = r"[^\s'\"/\\:,;()]+"
_PATH = re.compile(rf"(?:(?:(?<![\w./])|(?<=-[IL]))~?/|\b[A-Za-z]:[\\/])(?:{_PART}[/\\]+)+({_PART})")
"""An absolute path of two parts or more, without spaces; its last part is the group."""


def report() -> Report:
    """Make sections of (name, finding) rows, in reading order; needs no extra, and lists missing ones."""
    return [
        ("Versions", _versions()),
        ("Processor", _processor()),
        ("GPU", _gpus()),
        *((f"Backends for {device}, {_name(dtype)}", _backends(device, dtype)) for device, dtype in _cases()),
    ]


def as_text(sections: Report) -> str:
    """Format the report as plain text, one aligned line for each row."""
    width = max((len(name) for _, rows in sections for name, _ in rows), default=0)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]) for title, rows in sections
    ]
    return "\n\n".join(blocks)


def facts() -> dict[str, Any]:
    """Collect what the report says, for programs; docs/quickstart.md describes the keys.

    It names neither the user nor the machine: absolute paths in messages are cut to their last part, where a
    space or a quote ends a path, and the home folder is written ~.
    """
    packages = {package: _version(package) for package in OPTIONAL_PACKAGES}
    missing: dict[str, list[str]] = {}
    for package, version in packages.items():
        if version is None:
            missing.setdefault(OPTIONAL_PACKAGES[package], []).append(package)
    kernels = cpu.missing()
    return {
        "format": 1,
        "longshort": __version__,
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "packages": packages,
        "missing_extras": missing,
        "system": {"name": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": {
            "model": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "kernels": {
            "built": kernels is None,
            "reason": None if kernels is None else _without_folders(kernels),
            "instruction_set": cpu.instruction_set(),
            "instruction_sets": cpu.instruction_sets(),
        },
        "gpus": [_gpu_facts(index) for index in range(torch.cuda.device_count())],
        "backends": [_backend_facts(device, dtype) for device, dtype in _cases()],
    }


def _gpu_facts(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _backend_facts(device: str, dtype: torch.dtype) -> dict[str, Any]:
    facts = {"device": device, "dtype": _name(dtype), "chosen": None, "not_chosen": {}, "error": None}
    try:
        explanation = _explain(device, dtype)
    except RuntimeError as error:
        return facts | {"error": _without_folders(str(error))}
    reasons = {name: _without_folders(reason) for name, reason in explanation.reasons.items()}
    return facts | {"chosen": explanation.backend, "not_chosen": reasons}


def _without_folders(text: str) -> str:
    home = os.path.expanduser("~")
    if len(Path(home).parts) > 1:  # the root is no home: every path begins with it
        text = re.sub(rf"{re.escape(home)}(?![\w-]|\.\w)", "~", text)
    return _PATH.sub(r"\1", text)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Rows:
    rows = [("longshort", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    return rows + [
        (package, _version(package) or f"not installed: {install_command(package)}")
        for package in OPTIONAL_PACKAGES
    ]


def _processor() -> Rows:
    return [
        ("system", platform.platform()),
        ("cores", str(os.cpu_count())),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS or torch.set_num_threads changes it)"),
        ("vector instructions", torch.backends.cpu.get_cpu_capability()),
        ("C++ kernels", _kernels()),
    ]


def _kernels() -> str:
    reason = cpu.missing()
    if reason is None:
        others = ", ".join(cpu.instruction_sets())
        return f"built; {cpu.instruction_set()} in use (LONGSHORT_CPU chooses among {others})"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        advice = "install GCC 12 or Clang 14 at least (Debian: apt install g++), then longshort again"
    else:
        advice = f"a build needs GCC 12 or Clang 14 at least ({compiler} is here)"
    return (
        f"{reason}: CPU attention is several times slower; {advice}; pip install -v shows why a build fails"
    )


def _gpus() -> Rows:
    if torch.cuda.is_available():
        return [(f"cuda:{index}", _gpu(index)) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None and torch.version.hip is None:
        return [("none", f"torch {torch.__version__} is built without GPU support")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return [("none", f"torch is built for {built_for}, but no driver or no device is visible")]


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"


def _cases() -> list[tuple[str, torch.dtype]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [(device, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)]


def _backends(device: str, dtype: torch.dtype) -> Rows:
    """Explain for a typical call which backend is chosen and why the others are not."""
    try:
        explanation = _explain(device, dtype)
    except RuntimeError as error:  # a GPU that is visible but broken, busy or full
        return [("none", f"{device} cannot be used: {error}")]
    chosen = (explanation.backend, "chosen by backend='auto'")
    return [chosen, *((name, f"not chosen: {reason}") for name, reason in explanation.reasons.items())]


def _explain(device: str, dtype: torch.dtype) -> Explanation:
    layout = HeadLayout.split(num_heads=4, num_global=1, window=16)
    x = torch.zeros(1, layout.num_heads, 64, 64, device=device, dtype=dtype)
    return explain(x, x, x, layout)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
