"""Loading of a decoder and its tokenizer from a folder or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longshort.huggingface.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of weights, by name."""


class Pretrained(NamedTuple):
    """A model and its tokenizer.

    Attributes:
        model: the model, in the dtype to compute in.
        tokenizer: its tokenizer.
        saved_dtype: the dtype of the weights in files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saved_dtype: torch.dtype


def load_decoder(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Load a causal language model, in eval mode, and its tokenizer. Code that comes with a model is not run.

    Models of longshort itself load once `longshort.model` is imported.

    Args:
        name: folder of the model, or its id on the Hub.
        dtype: the dtype of the weights; None: as they were saved.
        attention: attention implementation; None: the model's default.
        device: for the model.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or the Hub cannot be
            reached.
        ValueError: it is no causal language model that transformers knows, its weights are no safetensors, it
            has no tokenizer, or it does not support the attention implementation.
    """
    name = str(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name}")
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    if attention is not None:
        options["attn_implementation"] = attention
    with without_progress_bars():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
            saved = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
        except OSError as error:
            if Path(name).is_dir():
                raise ValueError(f"{name} must hold a model: {first_line(error)}") from error
            raise FileNotFoundError(
                f"there is no folder {name}, and the Hugging Face Hub gave no model of that name: "
                f"{first_line(error)}"
            ) from error
        except (ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"{name} cannot be loaded as a causal language model: {first_line(error)}"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ValueError(f"{name} must have a tokenizer beside its model: {first_line(error)}") from error
    saved_dtype = saved if isinstance(saved, torch.dtype) else model.dtype
    return Pretrained(model.to(device).eval(), tokenizer, saved_dtype)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; with the kind of error where that says little without."""
    says_enough = isinstance(error, ValueError | RuntimeError | OSError | ImportError) and str(error).strip()
    return (str(error) if says_enough else repr(error)).strip().splitlines()[0]
