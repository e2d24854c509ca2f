"""Writing of pretrained decoders and their tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longshort.data.files import sync_folder, sync_tree
from longshort.huggingface.loading import Pretrained
from longshort.huggingface.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    with without_progress_bars():
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
