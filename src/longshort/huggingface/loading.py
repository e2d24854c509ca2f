"""Loading of a decoder and its tokenizer from a folder or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_decoder(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer. Code that comes with a model is not run.

    Args:
        name: folder of the model, or its id on the Hub.
        dtype: of the weights; None: as they were saved.
        attention: attention implementation; None: the model's default.
        device: for the model.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or the Hub cannot be
        reached.
        ValueError: it is no causal language model that transformers knows, its weights are no safetensors, or
            it does not support the attention implementation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{name} must hold a model: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"there is no folder {name}, and no model {name} that the Hugging Face Hub gives: "
            f"{_first_line(error)}"
        ) from error
    except (ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"{name} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"{name} must have a tokenizer beside its model: {_first_line(error)}") from error
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
