"""Healing of a converted model: a short training that regains the loss it had before the conversion.

A folder MODEL that `convert` wrote is trained on text. MODEL/healing has the settings, the state of the
training and the report. At the end the healed weights replace those of MODEL, and the old ones are kept in
MODEL/unhealed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Le

from longshort.checks import check_fields
from longshort.conversion.heads import find_heads
from longshort.conversion.losses import attending, mean_loss
from longshort.conversion.model_card import write_healing_card
from longshort.conversion.models import save_into
from longshort.conversion.short_training import STATE_FILE, Progressed, Recipe, ShortTraining
from longshort.data import Batches, DataFolder, load_tokenizer, prepare, validation_windows
from longshort.data.files import sync_tree
from longshort.extras import require
from longshort.huggingface import layouts_of, remove
from longshort.huggingface.loading import Pretrained, load_decoder
from longshort.reporting.files import replace_file, strict_json

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER, UNHEALED = "healing", "unhealed"
OUTCOME_FILE, REPORT_FILE = "outcome.json", "report.html"
_WEIGHTS = "model*.safetensors*"
_SETTINGS = "settings.json"
_MINUTES = 20.0


@dataclass(frozen=True)
class HealSettings:
    """The settings of a healing.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    model: Path
    """Folder of the converted model."""

    data: Path
    """Folder that `longshort data` wrote with the model's tokenizer, or a source of text as that command
    takes it: a file, a folder, stdlib."""

    minutes: Annotated[float, Gt(0)] | None = None
    """Time to train, measurements included. None: 20, or with --steps no limit."""

    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps to train. None: as many as the time allows."""

    full_budget: bool = False
    """Train until the time or the steps are used up, even if the loss is regained before."""

    until_rise: float = 0.0
    """Nats per token above the loss of the original at which the loss counts as regained."""

    lora: Annotated[int, Ge(1)] | None = None
    """Train factors of this rank for each matrix, and merge them in the end. None: train all weights."""

    distill: Path | None = None
    """A teacher whose logits are imitated too: the original, or another model with the same tokenizer."""

    distill_weight: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the divergence from the logits of --distill in the loss; the rest is the cross-entropy."""

    reference: bool = False
    """Also train the original, the model before its conversion, for as many steps on the same batches."""

    learning_rate: Annotated[float, Gt(0)] | None = None
    """Largest learning rate. None: 1e-4, with --lora 1e-3."""

    sequence_length: Annotated[int, Ge(2)] = 1024
    """Tokens of a training sequence."""

    batch_size: Annotated[int, Ge(1)] = 1
    """Sequences of an optimizer step."""

    held_out: Annotated[int, Ge(1)] = 8
    """Validation sequences that the loss is measured on."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of the batches."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def recipe(self) -> Recipe:
        """The recipe by which each model is trained."""
        rate = self.learning_rate or (1e-4 if self.lora is None else 1e-3)
        minutes = _MINUTES if self.minutes is None and self.steps is None else self.minutes
        seconds = None if minutes is None else 60 * minutes
        weight = 0.0 if self.distill is None else self.distill_weight
        return Recipe(self.steps, seconds, rate, weight, seed=self.seed)


@dataclass(frozen=True)
class Healing:
    """The result of `heal`.

    Attributes:
        original: loss of the original on the held-out windows, nats per token.
        healed: how the training of the converted model went; its first line is the loss before.
        reference: how that of the original went; None without one.
        is_complete: whether the training is done and MODEL has the healed weights; False after Ctrl-C.
    """

    original: float
    healed: Progressed
    reference: Progressed | None
    is_complete: bool


Report = Callable[[str, Progressed], None]


def heal(settings: HealSettings, device: torch.device | str = "cpu", report: Report | None = None) -> Healing:
    """Train a converted model for a short time, or resume such a training.

    Args:
        settings: the settings; to resume, the same as before.
        device: the device to train on.
        report: called after each step with "healing" or "reference".

    Raises:
        FileNotFoundError: there is no such model or data.
        FileExistsError: the model is healed already.
        ValueError: the model has no layouts, the data is of another tokenizer or too short, the settings are
            not those with which the healing was begun, or the loss is not finite.
        OSError: a file could not be written.
    """
    folder = settings.model / FOLDER
    outcome = folder / OUTCOME_FILE
    if outcome.exists():
        raise FileExistsError(f"{settings.model} is healed already; {folder} has the report")
    is_begun = _compare_settings(settings, folder)
    pretrained = _load_unhealed(settings, device)
    if layouts_of(pretrained.model) is None:
        raise ValueError(f"{settings.model} must be a converted model, got one without layouts")
    teacher = None if settings.distill is None else _open_teacher(settings.distill, pretrained, device)
    data = _open_data(settings, pretrained.tokenizer, is_begun)
    batches = Batches(data.train, settings.sequence_length, settings.batch_size, settings.seed)
    held_out = _windows(data, settings)
    replace_file(folder / _SETTINGS, strict_json(_as_json(settings)).encode())
    original = _loss_of_original(pretrained.model, held_out, folder)
    say = report or (lambda _name, _progressed: None)

    model = _trainable(pretrained.model, settings)
    training = ShortTraining(model, batches, held_out, settings.recipe, folder, teacher)
    goal = None if settings.full_budget else original + settings.until_rise
    healed = training.run(lambda now: say("healing", now), goal)
    if not healed.is_done:
        return Healing(original, healed, None, is_complete=False)
    trained = _as_saved(model, settings, pretrained.saved_dtype)
    healed = _measured_last(healed, trained, held_out)
    reference = None
    if settings.reference:
        reference = _train_original(settings, healed, batches, held_out, device, say)
    is_complete = reference is None or reference.is_done
    healing = Healing(original, healed, reference, is_complete)
    if is_complete:
        replace_weights(settings.model, pretrained._replace(model=trained))
        _write_card(settings, trained, data.train.source, healing)
        (folder / REPORT_FILE).unlink(missing_ok=True)  # of an interruption
        replace_file(outcome, strict_json(_content(settings, original, healed, reference)).encode())
        for state in folder.rglob(STATE_FILE):
            state.unlink()
    return healing


def read_healing(model: Path) -> Healing | None:
    """Read how a healing that is complete went from MODEL/healing/outcome.json; None if there is none.

    Raises:
        OSError: the file could not be read.
    """
    file = model / FOLDER / OUTCOME_FILE
    if not file.exists():
        return None
    content = json.loads(file.read_text())

    def progressed(lines: list[dict[str, float]]) -> Progressed:
        return Progressed(content["steps"], None, lines[-1]["seconds"], lines, is_done=True)

    reference = content["reference_lines"]
    return Healing(
        content["original_loss"],
        progressed(content["lines"]),
        None if reference is None else progressed(reference),
        is_complete=True,
    )


def replace_weights(folder: Path, pretrained: Pretrained) -> None:
    """Replace the weights in a model's folder; the old ones are kept in FOLDER/unhealed, unless it exists."""
    partial = folder / FOLDER / "new.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_into(pretrained, partial)
    sync_tree(partial)
    kept = folder / UNHEALED
    if not kept.exists():
        copy = folder / FOLDER / "old.partial"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in partial.iterdir():  # the same names, with the old contents
            if (folder / file.name).is_file():
                shutil.copy2(folder / file.name, copy / file.name)
        sync_tree(copy)
        copy.rename(kept)
    for file in sorted(partial.glob(_WEIGHTS)):
        file.replace(folder / file.name)
    shutil.rmtree(partial)


def _load_unhealed(settings: HealSettings, device: torch.device | str) -> Pretrained:
    kept = settings.model / UNHEALED  # exists if the end of a healing was interrupted
    return load_decoder(kept if kept.exists() else settings.model, dtype=torch.float32, device=device)


def _compare_settings(settings: HealSettings, folder: Path) -> bool:
    """Return whether a healing was begun; raise a ValueError if that was with other settings."""
    if not (folder / _SETTINGS).exists():
        return False
    held, wanted = json.loads((folder / _SETTINGS).read_text()), _as_json(settings)
    differing = [name for name in wanted if held.get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{folder} was begun with another {', '.join(differing)}: "
            f"{ {name: held.get(name) for name in differing} }; remove that folder to start over"
        )
    return True


def _as_json(settings: HealSettings) -> dict[str, Any]:
    values = {entry.name: getattr(settings, entry.name) for entry in fields(HealSettings)}
    del values["model"]  # a folder may be moved
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _open_data(settings: HealSettings, tokenizer: PreTrainedTokenizerBase, is_begun: bool) -> DataFolder:
    """Open a data folder, or make one from text."""
    source = settings.data
    if not (source / "train.json").exists():
        made = settings.model / FOLDER / "data"
        if not is_begun:  # else the data is complete, and of the same source
            prepare(str(source), made, tokenizer=settings.model, validation_fraction=0.1, overwrite=True)
        return DataFolder.open(made)
    data = DataFolder.open(source)
    if load_tokenizer(data.tokenizer_dir).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{source} must be made with the tokenizer of {settings.model}: "
            f"longshort data SOURCE --tokenizer {settings.model} --out DIR"
        )
    return data


def _windows(data: DataFolder, settings: HealSettings) -> Int64[Tensor, "count length"]:
    batch = validation_windows(data.validation, settings.sequence_length, settings.held_out)
    return torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)


def _loss_of_original(model: PreTrainedModel, held_out: Tensor, folder: Path) -> float:
    """Measure the model with all heads global, before anything is trained."""
    file = folder / "original.json"
    if not file.exists():
        heads = find_heads(model)
        with attending(heads.layouts(heads.candidates, 1, 0)):
            loss = mean_loss(model, held_out)
        replace_file(file, strict_json({"loss": loss}).encode())
    return json.loads(file.read_text())["loss"]


def _train_original(
    settings: HealSettings, healed: Progressed, batches: Batches, held_out: Tensor, device: Any, say: Report
) -> Progressed:
    """Train the unhealed weights, with all heads global, at the same learning rates."""
    original = _load_unhealed(settings, device)
    remove(original.model)
    rates = tuple(line["learning_rate"] for line in healed.lines[1:])
    recipe = replace(
        settings.recipe, steps=healed.planned or healed.step, seconds=None, distill_weight=0.0, rates=rates
    )
    model = _trainable(original.model, settings)
    training = ShortTraining(model, batches, held_out, recipe, settings.model / FOLDER / "reference")
    trained = training.run(lambda now: say("reference", now), steps=healed.step)
    if not trained.is_done:
        return trained
    return _measured_last(trained, _as_saved(model, settings, original.saved_dtype), held_out)


def _trainable(model: PreTrainedModel, settings: HealSettings) -> Any:
    """Let all weights be trained, or factors beside them."""
    if settings.lora is None:
        return model.requires_grad_(True)
    require("the setting lora", "peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)  # of the factors
    config = LoraConfig(
        r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft asks transformers for a deprecated name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


@torch.no_grad()
def _as_saved(model: Any, settings: HealSettings, dtype: torch.dtype) -> PreTrainedModel:
    """Merge the factors, if there are any, and round the weights as saving in a dtype does."""
    trained = (model.merge_and_unload() if settings.lora else model).eval()
    for entry in trained.state_dict().values():
        if isinstance(entry, torch.Tensor) and entry.is_floating_point():
            entry.copy_(entry.to(dtype))
    return trained


def _measured_last(progressed: Progressed, trained: PreTrainedModel, held_out: Tensor) -> Progressed:
    """Let the last loss be that of the weights in files, which differs by what was rounded."""
    last = {**progressed.lines[-1], "held_out_loss": mean_loss(trained, held_out)}
    return replace(progressed, lines=[*progressed.lines[:-1], last])


def _write_card(settings: HealSettings, model: PreTrainedModel, text: str, healing: Healing) -> None:
    recipe = settings.recipe
    losses: list[tuple[float, str | None]] = [
        (healing.healed.last_held_out, None),
        (healing.original, "the original"),
        (healing.healed.lines[0]["held_out_loss"], "the converted model before the training"),
    ]
    if healing.reference is not None:
        losses.append((healing.reference.last_held_out, "the original, trained as long"))
    optional = {
        "rank of the trained factors (LoRA)": settings.lora,
        "share of a teacher's logits in the loss": recipe.distill_weight or None,
    }
    training = [
        ("optimizer steps", f"{healing.healed.step:,}"),
        ("sequences per step", f"{settings.batch_size:,}"),
        ("tokens per sequence", f"{settings.sequence_length:,}"),
        ("optimizer", "AdamW, without decay"),
        ("largest learning rate", f"{recipe.learning_rate:g}"),
        *((name, str(value)) for name, value in optional.items() if value is not None),
        ("precision", "fp32"),
        ("seed", str(settings.seed)),
    ]
    write_healing_card(settings.model, model, text, settings.sequence_length, losses, training)


def _open_teacher(name: Path, pretrained: Pretrained, device: Any) -> nn.Module:
    teacher = load_decoder(name, dtype=torch.float32, device=device)
    if teacher.tokenizer.get_vocab() != pretrained.tokenizer.get_vocab():
        raise ValueError(f"--distill must have the tokenizer of the converted model, got {name} with another")
    return teacher.model.requires_grad_(False)


def _content(
    settings: HealSettings, original: float, healed: Progressed, reference: Progressed | None
) -> dict[str, Any]:
    return {
        "original_loss": original,
        "converted_loss": healed.lines[0]["held_out_loss"],
        "healed_loss": healed.last_held_out,
        "reference_loss": None if reference is None else reference.last_held_out,
        "steps": healed.step,
        "seconds": healed.seconds,
        "recipe": asdict(settings.recipe),
        "lines": healed.lines,
        "reference_lines": None if reference is None else reference.lines,
    }
