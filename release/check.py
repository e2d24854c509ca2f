"""Check what release/build.sh built twice: bytes, metadata and contents, and that it installs and works."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[1]
SECONDS_TO_INSTALL = 20
# Every Linux has them; what else a module needs would have to come with the wheel.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
LICENSES = {"licenses/LICENSE", "licenses/licenses/nanobind.txt", "licenses/licenses/robin-map.txt"}
TESTS = ["tests/test_attention.py", "tests/test_import.py"]


def require(condition: bool, message: str) -> None:
    """End the program with a message unless the condition holds."""
    if not condition:
        sys.exit(f"release/check.py: {message}")


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that matches."""
    found = sorted(folder.glob(pattern))
    require(len(found) == 1, f"{folder} should have one {pattern}, has {[path.name for path in found]}")
    return found[0]


def check_same_bytes(dist: Path, again: Path) -> None:
    """Compare two builds, file by file."""
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (dist, again)
    ]
    require(digests[0] == digests[1], f"two builds differ: {digests[0]} and {digests[1]}")


def committed(*paths: str) -> set[str]:
    """Return the files of the last commit."""
    command = ["git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", "HEAD", *paths]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def check_sdist(path: Path) -> None:
    """Compare the files of the sdist with those of the last commit."""
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wrong = names ^ (committed() | {"PKG-INFO"})
    require(not wrong, f"{path.name}: {sorted(wrong)} are too many or missing")


def check_wheel(path: Path, kernels: bool) -> None:
    """Compare the files of a wheel with src/ of the last commit, and read its module and its SBOM."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    module = [
        name for name in files if name.startswith("longshort/backends/_kernels.") and name.endswith(".so")
    ]
    require(len(module) == kernels, f"{path.name} has the modules {module}")
    info = f"longshort-{path.name.split('-')[1]}.dist-info/"
    expected = {name.removeprefix("src/") for name in committed("src")} | set(module)
    expected |= {info + name for name in {"METADATA", "RECORD", "WHEEL", "entry_points.txt"} | LICENSES}
    expected |= {info + "sboms/sbom.json"} if kernels else set()
    require(set(files) == expected, f"{path.name}: {sorted(set(files) ^ expected)} are too many or missing")
    if kernels:
        check_module(files[module[0]])
        check_sbom(files[info + "sboms/sbom.json"].decode())


def check_module(content: bytes) -> None:
    """Check that a module needs no library but the system's, and has no symbols of a debugger."""
    elf = ELFFile(BytesIO(content))
    dynamic = elf.get_section_by_name(".dynamic")
    assert isinstance(dynamic, DynamicSection)
    needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    extra = {name for name in needed - SYSTEM_LIBRARIES if not name.startswith("ld-linux")}
    require(not extra, f"the module needs {sorted(extra)}")
    require(elf.get_section_by_name(".symtab") is None, "the module is not stripped")


def check_sbom(text: str) -> None:
    """Validate an SBOM by the schema of CycloneDX, and compare its versions with what was built in."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    require(error is None, f"the SBOM is not CycloneDX: {error}")
    versions = {part["name"]: part["version"] for part in json.loads(text)["components"]}
    require(versions["nanobind"] == version("nanobind"), f"the SBOM has {versions}")
    require(versions["robin-map"].count(".") == 2, f"the SBOM has {versions}")


def link_packages(python: Path, folder: Path) -> None:
    """Link the packages that a Python has, except longshort, into a folder."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    folder.mkdir()
    for path in Path(packages).iterdir():
        if path.suffix != ".pth" and not path.name.startswith(("longshort", "_editable", "pip")):
            (folder / path.name).symlink_to(path)


def check_installed(python: Path, packages: Path, wheel: list[str], folder: Path, pure: bool) -> None:
    """Install into a new environment, without a compiler, that sees other packages, and test it there."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    # that of CPython 3.11's environments is older than torch requires, and would hide the other
    subprocess.run([inside, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    (next(folder.glob("lib/python*/site-packages")) / "packages.pth").write_text(f"{packages}\n")
    environment = {"PATH": str(inside.parent), "HOME": os.environ["HOME"]}
    for name in ("c++", "g++", "gcc", "cc", "clang", "cmake"):
        require(shutil.which(name, path=environment["PATH"]) is None, f"{name} is in {inside.parent}")
    start = time.monotonic()
    command = [inside, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", *wheel]
    subprocess.run(command, env=environment, check=True)
    seconds = time.monotonic() - start
    require(
        seconds < SECONDS_TO_INSTALL, f"installing took {seconds:.0f} s, should take {SECONDS_TO_INSTALL}"
    )
    print(f"installed in {seconds:.1f} s: {wheel[-1]}")

    def run(*arguments: str | Path, **extra: str) -> None:
        subprocess.run([inside, *arguments], env={**environment, **extra}, cwd=folder, check=True)

    run(ROOT / "release" / "smoke.py", *(["--pure"] if pure else []))
    if pure:
        return
    code = "import longshort.backends.cpu as cpu; print(*cpu.instruction_sets())"
    sets = subprocess.run(
        [inside, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    for name in sets.stdout.split():
        print(f"instruction set {name}: ", end="", flush=True)
        run(ROOT / "release" / "smoke.py", LONGSHORT_CPU=name)
    # a copy, so that the tests cannot import the source
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    run("-m", "pytest", "-q", "-m", "not slow", *TESTS)


def main() -> None:
    """Run all checks; end with exit code 1 at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="the build")
    parser.add_argument("again", type=Path, help="a second build of the same commit")
    parser.add_argument(
        "--python", type=Path, required=True, help="a Python that has torch and the packages for tests"
    )
    arguments = parser.parse_args()
    dist = arguments.dist.resolve()
    check_same_bytes(dist, arguments.again)
    sdist, pure, kernels = (only(dist, f"*{end}") for end in (".tar.gz", "-none-any.whl", "linux_*.whl"))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, pure, kernels], check=True)
    check_sdist(sdist)
    check_wheel(pure, kernels=False)
    check_wheel(kernels, kernels=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        link_packages(arguments.python, folder / "packages")
        installs = {"kernels": ["--find-links", str(dist), "longshort"], "pure": ["--no-deps", str(pure)]}
        for name, wheel in installs.items():
            check_installed(arguments.python, folder / "packages", wheel, folder / name, pure=name == "pure")
    print(f"{dist}: {sdist.name}, {pure.name} and {kernels.name} are right")


if __name__ == "__main__":
    main()
