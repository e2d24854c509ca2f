"""Opening of pretrained decoders and their tokenizers, and writing of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import longshort.huggingface  # models with layouts load after it
import longshort.model  # noqa: F401  and so do our own
from longshort.data.files import sync_folder, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Pretrained(NamedTuple):
    """A model and its tokenizer.

    Attributes:
        model: in the dtype to compute in.
        tokenizer: its tokenizer.
        saved_dtype: of the weights in files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    saved_dtype: torch.dtype


def open_pretrained(name: str | Path, device: torch.device | str = "cpu", dtype: str = "auto") -> Pretrained:
    """Load a causal language model and its tokenizer, for evaluation.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hugging Face Hub.
        device: of the model.
        dtype: of the weights: float32, bfloat16, float16, or "auto": float32 on a CPU, where the others are
            slow, and that of the saved weights elsewhere.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no causal language model, its tokenizer has no fast form, or dtype is none of those.
    """
    if dtype not in DTYPES and dtype != "auto":
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    looks_like_a_path = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1
    if looks_like_a_path and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {str(name)!r} with a model")
    device = torch.device(device)
    kind: Any = DTYPES.get(dtype, "auto")
    if dtype == "auto" and device.type == "cpu":
        kind = torch.float32
    with quiet():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=kind, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
            saved = AutoConfig.from_pretrained(str(name), trust_remote_code=False).dtype
        except OSError as error:
            raise FileNotFoundError(
                f"no model could be loaded from {str(name)!r}: {_first_line(error)}"
            ) from error
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"no causal language model loads from {str(name)!r}: {_first_line(error)}"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer of {str(name)!r} has no fast form (tokenizer.json)")
    tokenizer.model_max_length = int(1e30)  # texts are cut here, not by the tokenizer
    saved_dtype = saved if isinstance(saved, torch.dtype) else model.dtype
    return Pretrained(model.to(device).eval(), tokenizer, saved_dtype)


def add_model_files(pretrained: Pretrained, folder: Path) -> None:
    """Write a model and its tokenizer into a folder; config.json, which makes it a model's, comes last.

    Raises:
        OSError: a file could not be written.
    """
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_into(pretrained, partial)
    sync_tree(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    partial.rmdir()
    sync_folder(folder)


def save_into(pretrained: Pretrained, folder: Path) -> None:
    """Save a model, in the dtype that its files had, and its tokenizer into a folder; neither is changed."""
    model: Any = pretrained.model
    limit = pretrained.tokenizer.init_kwargs.get("model_max_length")
    with quiet():
        held_dtype = model.config.dtype
        try:
            model.save_pretrained(folder, state_dict=_state_in(pretrained.saved_dtype, model))
            model.config.dtype = str(pretrained.saved_dtype).removeprefix("torch.")
            model.config.save_pretrained(folder)  # which has just been saved with the dtype computed in
        finally:
            model.config.dtype = held_dtype
        held, pretrained.tokenizer.model_max_length = (
            pretrained.tokenizer.model_max_length,
            limit or int(1e30),
        )
        try:
            pretrained.tokenizer.save_pretrained(folder)
        finally:
            pretrained.tokenizer.model_max_length = held


def _state_in(dtype: torch.dtype, model: PreTrainedModel) -> dict[str, Any]:
    """Copy a model's state with floating-point numbers in a dtype; tied weights stay tied."""
    state: dict[str, Any] = model.state_dict()
    copies: dict[Any, torch.Tensor] = {}
    for name, entry in state.items():
        if isinstance(entry, torch.Tensor) and entry.is_floating_point() and entry.dtype != dtype:
            place = entry.data_ptr(), entry.shape, entry.stride()
            if place not in copies:
                copies[place] = entry.to(dtype)
            state[name] = copies[place]
    return state


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars of transformers, which would disturb ours."""
    were_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
