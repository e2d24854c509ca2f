"""Model cards: README.md of a model with layouts, as the Hugging Face Hub reads it, and uploads with one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from transformers.utils import logging

from longshort import __version__
from longshort.huggingface.state import layouts_of, text_config
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_SEAL = re.compile(r"\n<!-- longshort wrote this card: ([0-9a-f]{64}) -->\n\Z")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """A measured number, for the table of a card.

    Attributes:
        name: what was measured, with its unit.
        value: the number.
        of: what the number is of, if not of the card's model, such as "step 600". Those of the model, None,
            are also part of the card's `model-index` if they have a metric and data.
        metric: identifier of the metric, such as "perplexity".
        data: name of the text.
        split: its part, such as "validation".
    """

    name: str
    value: float
    of: str | None = None
    metric: str | None = None
    data: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """The facts about a model that its config and weights do not hold; those not known are left out.

    Attributes:
        title: heading of the card; None: the name of the folder or repository.
        base_model: identifier on the Hub of the model that this one was made from; None: the one that it was
            loaded from, if that was from the Hub.
        license: identifier of its license, as the Hub has it.
        datasets: identifiers of datasets of the Hub.
        of: the model in the table of measurements, such as "step 600".
        training: names and values of settings and results of the training.
        measurements: measured numbers.
    """

    title: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    of: str = "this model"
    training: Sequence[tuple[str, str]] = ()
    measurements: Sequence[Measurement] = ()


def write_model_card(model: PreTrainedModel, folder: Path | str, facts: CardFacts | None = None) -> bool:
    """Write README.md for a model with layouts beside its files; return whether it was written.

    A README.md that is there already stays as it is, and a warning is logged, unless it is a card of
    longshort that nobody has changed since.

    Args:
        model: one of longshort, or one that `apply` has given layouts.
        folder: the folder that `save_pretrained` wrote.
        facts: what is known about it.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        TypeError: model is no model of transformers.
        ValueError: it has no layouts.
        OSError: the file could not be written.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold a saved model, got {folder} without a config.json")
    card = _card(model, folder, facts or CardFacts(), folder.resolve().name)
    path = folder / CARD_FILE
    if os.path.lexists(path) and not _is_untouched(path):
        logger.warning(f"{path} was there already, and stays as it is")
        return False
    partial = folder / f".{CARD_FILE}.partial"
    try:
        partial.write_text(card, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def is_own_card(folder: Path | str) -> bool:
    """Return whether a folder has no README.md that a user wrote or changed."""
    path = Path(folder) / CARD_FILE
    return not os.path.lexists(path) or _is_untouched(path)


def known_facts(folder: Path | str) -> CardFacts:
    """Return the base model, license and datasets that the card in a folder names, if there is one."""
    path = Path(folder) / CARD_FILE
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except (TypeError, ValueError, yaml.YAMLError):  # not a card
        data = {}
    base, license_, datasets = data.get("base_model"), data.get("license"), data.get("datasets")
    datasets = datasets if isinstance(datasets, list) else (datasets,)
    return CardFacts(
        base_model=base if isinstance(base, str) else None,
        license=license_ if isinstance(license_, str) else None,
        datasets=tuple(name for name in datasets if isinstance(name, str)),
    )


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: CardFacts | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] | str = (),
) -> CommitInfo:
    """Upload a model with layouts, its card and its tokenizer to the Hugging Face Hub, in one commit.

    A README.md that the repository has already stays, unless it is a card of longshort that nobody has
    changed since.

    Args:
        model: one of longshort, or one that `apply` has given layouts.
        repo_id: NAME or OWNER/NAME; a repository that does not exist is created.
        tokenizer: its tokenizer; None: none is uploaded.
        facts: what is known about the model, for its card.
        private: whether a repository that is created is private; None: as its owner has set.
        token: the token of the Hub; None: that of `hf auth login`.
        commit_message, commit_description: of the commit.
        revision: branch, made if there is none; None: main.
        create_pr: open a pull request with the commit.
        max_shard_size: the largest file of weights.
        tags: more tags for the card, beside those of `model.add_model_tags`.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: it has no layouts, or its config does not describe it.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    _require_layouts(model)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = folder / CARD_FILE
        card.unlink(missing_ok=True)  # a model of longshort writes one, which knows less
        if _has_other_card(repo_id, revision, token):
            logger.warning(f"{CARD_FILE} of {repo_id} stays as it is")
        else:
            more = [*(model.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]
            card.write_text(_card(model, folder, facts or CardFacts(), repo_id, more), encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _has_other_card(repo_id: str, revision: str | None, token: bool | str | None) -> bool:
    try:
        return not _is_untouched(Path(hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)))
    except RemoteEntryNotFoundError:
        return False


def _card(model: PreTrainedModel, folder: Path, facts: CardFacts, name: str, tags: Sequence[str] = ()) -> str:
    """Return the text of a card, sealed.

    Args:
        model: the model.
        folder: where its files are.
        facts: what else is known.
        name: the name of the folder or repository.
        tags: more tags.
    """
    layouts = _require_layouts(model)
    config = text_config(model)
    own = config.model_type == "longshort"
    is_causal_lm = model.can_generate() and config is model.config
    base_model = facts.base_model or _loaded_from(model)
    context = getattr(config, "max_position_embeddings", None)
    has_local = any(window is not None for layout in layouts if layout for window in layout.windows)
    title = facts.title or name.rpartition("/")[2]
    data = ModelCardData(
        base_model=None if base_model == name else base_model,
        datasets=list(facts.datasets) or None,
        license=facts.license,
        library_name="longshort",
        pipeline_tag="text-generation" if is_causal_lm else None,
        tags=["longshort", *(["ls-attention"] if has_local else []), *tags],
        model_name=title,
        eval_results=[_result(entry) for entry in facts.measurements if _is_result(entry)] or None,
    )
    if data.eval_results is None:
        del data.model_name  # the name is that of the results
    properties = [
        ("architecture", type(model).__name__),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("weights", json.loads((folder / "config.json").read_text())["dtype"]),
        ("layers", f"{len(layouts):,}"),
        ("context length", None if context is None else f"{context:,} tokens"),
        ("positions", _positions(config) if own else None),
        ("made from", None if base_model in (None, name) else base_model),
        (
            "saved with",
            f"longshort {__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        ),
    ]
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=_text(title),
        properties=[(entry, _text(value)) for entry, value in properties if value is not None],
        has_local=has_local,
        layouts=_layout_rows(layouts),
        training=[(_text(entry), _text(value)) for entry, value in facts.training],
        measurements=[_measurement_row(entry, facts.of) for entry in facts.measurements],
        loader="AutoModelForCausalLM" if is_causal_lm else "AutoModel" if own else type(model).__name__,
        module="longshort.model" if own else "longshort.huggingface",
        location=json.dumps(name if "/" in name else f"path/to/{title}"),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        context=None if context is None else f"{context:,}",
    )
    return _sealed(str(card))


def _require_layouts(model: PreTrainedModel) -> list[HeadLayout | None]:
    """Return the layout of each layer, also of a model of longshort itself."""
    config = text_config(model)
    own = getattr(config, "head_layouts", None)
    layouts = layouts_of(model) if own is None else own()
    if layouts is None:
        raise ValueError(
            f"model must have layouts, got {type(model).__name__} without; call "
            "longshort.huggingface.apply(model, ...)"
        )
    return layouts


def _loaded_from(model: PreTrainedModel) -> str | None:
    """Return the identifier on the Hub of the model that this one was loaded from; None: not from the Hub."""
    name = model.name_or_path
    if not name or Path(name).exists():  # a folder is what transformers takes first
        return None
    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # the name of a folder that is gone
        return None
    return name if is_cached else None


def _positions(config: Any) -> str:
    others = config.global_position_embedding
    kind = config.position_embedding
    return kind if others in (None, kind) else f"{kind}; global heads: {others}"


def _layout_rows(layouts: Sequence[HeadLayout | None]) -> list[tuple[str, ...]]:
    """Return a row for each run of layers with equal layouts."""
    rows, first = [], 0
    for layout, group in groupby(layouts):
        last = first + len(list(group)) - 1
        layers = str(first) if first == last else f"{first}–{last}"
        first = last + 1
        if layout is None:
            rows.append((layers, "no attention", "", "", "", ""))
            continue
        windows = sorted(window for window in layout.windows if window is not None)
        shown = [
            f"{window:,}" if len(set(windows)) == 1 else f"{window:,} ({len(list(heads))})"
            for window, heads in groupby(windows)
        ]
        numbers = (layout.num_heads, layout.num_kv_heads, layout.num_heads - len(windows))
        rows.append((layers, *map(str, numbers), ", ".join(shown) or "–", str(layout.sink_tokens)))
    return rows


def _measurement_row(entry: Measurement, of: str) -> tuple[str, ...]:
    number = f"{entry.value:,}" if isinstance(entry.value, int) else f"{entry.value:.4f}"
    data = ", ".join(part for part in (entry.data, entry.split) if part is not None)
    return _text(entry.name), number, _text(entry.of or of), _text(data)


def _text(value: str) -> str:
    """Escape what Markdown would take for markup, also in a table."""
    return re.sub(r"([\\`*_|<\[\]])", r"\\\1", " ".join(value.split()))


def _is_result(entry: Measurement) -> bool:
    return entry.metric is not None and entry.of is None and entry.data is not None


def _result(entry: Measurement) -> EvalResult:
    assert entry.data is not None and entry.metric is not None
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=entry.data,
        dataset_name=entry.data,
        dataset_split=entry.split,
        metric_type=entry.metric,
        metric_name=entry.name,
        metric_value=entry.value,
    )


def _sealed(text: str) -> str:
    """Append a comment with the digest of a card, by which one that nobody changed is recognised."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- longshort wrote this card: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_untouched(path: Path) -> bool:
    if not path.is_file():
        return False
    content = path.read_bytes().decode(errors="replace")
    seal = _SEAL.search(content)
    return seal is not None and hashlib.sha256(content[: seal.start()].encode()).hexdigest() == seal.group(1)
