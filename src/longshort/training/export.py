"""A checkpoint of a run as one folder for `from_pretrained`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from longshort.data.files import sync_folder, sync_tree
from longshort.huggingface.model_card import CARD_FILE, is_own_card, write_model_card
from longshort.huggingface.progress_bars import without_progress_bars
from longshort.training.model_card import run_facts
from longshort.training.trained import open_trained

_FILES = ("config.json", "model.safetensors")
"""The files by which an exported model is recognised."""
_OTHER_FILES = (
    CARD_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates",
)  # fmt: skip
"""What else `save_pretrained` of models and tokenizers writes."""


def export_run(run: Path | str, out: Path | str, *, step: int | None = None, overwrite: bool = False) -> int:
    """Write the weights of a checkpoint, its config, its tokenizer and a model card; return its step.

    Args:
        run: the run's folder.
        out: folder to create; complete or not at all.
        step: step of the checkpoint; None: the latest.
        overwrite: replace `out` if it holds an exported model and no file of another name; a README.md that
            its user wrote or changed is kept.

    Raises:
        FileExistsError: `out` exists, and may not be replaced.
        FileNotFoundError, OSError, ValueError: as in `open_trained`; or the metrics are damaged.
    """
    out = Path(out).absolute()
    is_taken = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    is_exported = out.is_dir() and all((out / name).is_file() for name in _FILES)
    is_exported = is_exported and not (out / "state.json").exists()  # that is a checkpoint
    if is_taken and not overwrite:
        raise FileExistsError(f"{out} exists already; --overwrite replaces an exported model")
    if is_taken and not is_exported:
        raise FileExistsError(f"{out} exists and holds no exported model; it stays as it is")
    others = sorted({path.name for path in out.glob("*")} - {*_FILES, *_OTHER_FILES})
    if is_taken and others:
        raise FileExistsError(
            f"{out} stays as it is: beside an exported model it holds what would be lost, {', '.join(others)}"
        )
    trained = open_trained(run, step=step)
    facts = run_facts(run, trained.config, trained.step)
    partial, replaced = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with without_progress_bars():
            trained.model.save_pretrained(partial, max_shard_size="1TB", model_card=False)
        trained.tokenizer.save_pretrained(partial)
        if is_own_card(out):
            write_model_card(trained.model, partial, replace(facts, title=out.name))
        else:
            shutil.copy2(out / CARD_FILE, partial / CARD_FILE)
        sync_tree(partial)
        if is_taken:
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return trained.step
