"""The optional packages, and the error that names the command which installs them. Needs nothing itself."""

from __future__ import annotations

from importlib.util import find_spec

OPTIONAL_PACKAGES = {
    "annotated-types": "train",
    "transformers": "hf",
    "safetensors": "hf",
    "datasets": "train",
    "tokenizers": "train",
    "numpy": "train",
    "pandas": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "shtab": "train",
    "tyro": "train",
    "rich": "train",
    "scipy": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "jinja2": "train",
    "peft": "train",
    "gguf": "examples",
    "lm-eval": "examples",
    "ipykernel": "notebook",
    "ipywidgets": "notebook",
}
"""The extra that installs each package, by the name of its distribution."""


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message has the command that installs it."""


def require(user: str, *packages: str) -> None:
    """Raise an error unless all of these packages are installed; imports none of them.

    Args:
        user: what needs them, for the message.
        packages: names of distributions.

    Raises:
        MissingPackageError: some are missing.
    """
    for package in packages:
        module = package.replace("-", "_")
        if find_spec(module) is None:
            raise MissingPackageError(f"{user} needs {package}: {install_command(module)}", name=module)


def install_command(module: str) -> str | None:
    """Return the command that installs the optional package of a module; None if it is not one of ours."""
    extra = OPTIONAL_PACKAGES.get(distribution(module))
    return None if extra is None else f"pip install 'longshort[{extra}]'"


def distribution(module: str) -> str:
    """Return the name of the distribution that holds a module of one of these packages."""
    return module.partition(".")[0].replace("_", "-")
