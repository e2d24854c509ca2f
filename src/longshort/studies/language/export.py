"""Copies of trained models that are small enough to take along: metrics, and weights in bf16."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longshort.data.files import sync_folder, sync_tree
from longshort.huggingface.progress_bars import without_progress_bars
from longshort.training.checkpoints import latest_checkpoint
from longshort.training.metrics import METRICS_FILE
from longshort.training.trained import open_trained


def export_models(runs: Mapping[str, Path], folder: Path) -> None:
    """Write FOLDER/NAME for each run that has a checkpoint, complete or not at all.

    Each holds the run's metrics.jsonl and what `from_pretrained` reads: the config, and the weights of the
    latest checkpoint, rounded to bf16. Older copies are replaced.

    Args:
        runs: folders of runs by name; none of them is training now.
        folder: the folder to write to.

    Raises:
        OSError: a file could not be read or written.
    """
    for name, run in runs.items():
        if latest_checkpoint(run) is None:
            continue
        final, partial = folder / name, folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with without_progress_bars():
            model: Any = open_trained(run).model
            model.to(torch.bfloat16).save_pretrained(partial, model_card=False)
        shutil.copyfile(run / METRICS_FILE, partial / METRICS_FILE)
        sync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(folder)
