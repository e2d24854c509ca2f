"""Rules of the architecture that import-linter cannot hold."""

import ast
import re
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def package_of(module: str) -> str:
    """The package, or the module, right below `longshort` that a module belongs to."""
    return ".".join(module.split(".")[:2])


@cache
def imports(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) for each import statement of a file; name is None for `import module`."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_module(name: str) -> bool:
    package = ROOT / "src" / "longshort"
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_private_name_crosses_packages(path: Path) -> None:
    package = package_of(module_of(path))
    crossing = [
        f"{module}.{name}"
        for module, name in imports(path)
        if module.split(".")[0] == "longshort"
        and package_of(module) != package
        and any(is_private(part) for part in [*module.split("."), name or ""])
    ]
    assert crossing == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packages_import_each_other_not_the_top_level(path: Path) -> None:
    tree = ast.walk(ast.parse(path.read_text()))
    names = [name for module, name in imports(path) if module == "longshort" and name is not None]
    names += [
        node.attr
        for node in tree
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "longshort"
    ]
    from_the_top = [name for name in names if name != "__version__" and not is_module(name)]
    assert from_the_top == []


def test_no_import_circle() -> None:
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        module: {
            f"{source}.{name}" if f"{source}.{name}" in modules else source
            for source, name in imports(path)
            if source in modules
        }
        for module, path in modules.items()
    }
    assert len(graph) > 100
    TopologicalSorter(graph).prepare()  # raises a CycleError


def test_no_path_of_one_machine_in_the_project() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    machine_path = re.compile(r"(?<![\w./])/(?:home|root|tmp|work|Users|opt|mnt)/\w")
    found = []
    for name in listed:
        path = ROOT / name
        if path.suffix not in {".py", ".md", ".toml", ".txt", ".yaml", ""} or not path.is_file():
            continue
        lines = path.read_text().splitlines()
        found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if machine_path.search(line)]
    assert found == []
