"""What `import longshort` costs: each check runs in a fresh interpreter."""

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


def test_import_pulls_in_torch_alone() -> None:
    code = "import torch, sys, json; before = set(sys.modules); import longshort; "
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    added = json.loads(run(code))
    assert "longshort.attention" in added
    assert [name for name in added if name.split(".")[0] in OPTIONAL] == []


def test_import_works_without_any_optional_package() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); "
    code += "import longshort, longshort.doctor; longshort.doctor.report(); print(longshort.__version__)"
    assert run(code).strip()


def test_import_takes_less_than_a_second_beyond_torch() -> None:
    code = "import torch, time; start = time.perf_counter(); import longshort; "
    code += "print(time.perf_counter() - start)"
    assert any(float(run(code)) < 1 for _ in range(3))  # a busy machine has three tries
