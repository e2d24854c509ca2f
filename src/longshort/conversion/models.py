"""Writing of pretrained decoders and their tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from longshort.data.files import sync_folder, sync_tree
from longshort.huggingface.loading import Pretrained, without_progress_bars


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
    """Save a model, in the dtype that its files had, and its tokenizer into a folder."""
    model: Any = pretrained.model
    computed_dtype = model.dtype
    with without_progress_bars():
        model.to(pretrained.saved_dtype).save_pretrained(folder)
        model.to(computed_dtype)
        pretrained.tokenizer.save_pretrained(folder)
