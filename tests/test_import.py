"""What `import longshort`, and what it offers, costs: each check runs in a fresh interpreter."""

import json
import subprocess
import sys

OPTIONAL = [
    "datasets", "huggingface_hub", "hypothesis", "jaxtyping", "jinja2", "matplotlib", "pandas", "pyarrow",
    "rich", "safetensors", "tensorboard", "tokenizers", "transformers", "tyro",
]  # fmt: skip


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout


def test_import_waits_for_nothing() -> None:
    added = run("import sys, longshort; print(longshort.__version__, *sys.modules)").split()
    assert "torch" not in added


def test_each_name_is_there_in_any_order() -> None:
    """Submodules have names of their own; the one called attention must not hide the function."""
    code = "import longshort.layers, longshort; from longshort import attention; "
    code += (
        "print(callable(attention), longshort.attention is attention, longshort.layout.HeadLayout.__name__, "
    )
    code += "set(longshort.__all__) <= set(dir(longshort)), hasattr(longshort, 'nothing'))"
    assert run(code).split() == ["True", "True", "HeadLayout", "True", "False"]


def test_import_pulls_in_torch_alone() -> None:
    code = "import torch, sys, json; before = set(sys.modules); from longshort import *; "
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    added = json.loads(run(code))
    assert "longshort.attention" in added
    assert [name for name in added if name.split(".")[0] in OPTIONAL] == []


def test_import_works_without_any_optional_package() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); "
    code += "import longshort, longshort.doctor; longshort.doctor.report(); print(longshort.__version__)"
    assert run(code).strip()


def test_import_takes_less_than_a_second_beyond_torch() -> None:
    code = "import torch, time; start = time.perf_counter(); from longshort import *; "
    code += "print(time.perf_counter() - start)"
    assert any(float(run(code)) < 1 for _ in range(3))  # a busy machine has three tries
