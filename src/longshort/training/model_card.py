"""The facts of a run for the model card of a checkpoint: how it was trained, and what was measured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshort.huggingface import CardFacts, Measurement
from longshort.training.metrics import METRICS_FILE, read_metrics
from longshort.training.run import RunConfig, open_same_data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EVALUATION_FOLDER = "evaluation"
_SPLIT = "validation"
_EVALUATED = {
    "loss": "loss in nats per token",
    "perplexity": "perplexity per token",
    "bits_per_byte": "bits per byte",
}
_LOGITS = {
    "max_logit": "largest attention logit",
    "max_logit_local": "largest attention logit of the local heads",
    "max_logit_global": "largest attention logit of the global heads",
    "max_logit_global_in_band": "largest attention logit of the global heads in the band of the local ones",
}


def run_facts(run: Path | str, config: RunConfig, step: int) -> CardFacts:
    """Collect the facts about the checkpoint of a step; lines of later steps are not read.

    Args:
        run: the run's folder.
        config: its config.
        step: step of the checkpoint.

    Raises:
        ValueError: a line of metrics.jsonl, or a file with an evaluation, is damaged.
    """
    run = Path(run)
    metrics = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    lines = [line for line in metrics if line["step"] <= step]
    source = _source(config)
    data = f"data folder {config.training.data.name}" if source is None else public_name(source)
    return CardFacts(
        datasets=[] if source is None else _datasets(source),
        of=f"step {step:,}",
        training=[*_training(config, step, data), *_remarks(lines)],
        measurements=[*_losses(lines, step, data), *_evaluations(run, config, step, data), *_logits(lines)],
    )


def _source(config: RunConfig) -> str | None:
    """Return the source of the training text; None if the data are not where they were."""
    try:
        return open_same_data(config).train.source
    except (OSError, ValueError):
        return None


def public_name(source: str) -> str:
    """Return the name of a source without the folders of the machine that it was read on."""
    return Path(source).name if source.removeprefix("hf:").startswith(("/", "~", "..")) else source


def _datasets(source: str) -> list[str]:
    found = re.match(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::|$)", source)
    return [found.group(1)] if found and not Path(found.group(1)).exists() else []


def _training(config: RunConfig, step: int, data: str) -> list[tuple[str, str]]:
    settings = config.training
    assert settings.sequence_length is not None
    optional = {
        "z-loss": settings.z_loss or None,
        "QK-clip above": settings.qk_clip,
        "separate documents": "yes" if settings.separate_documents else None,
        "token order": None if settings.token_order == "text" else settings.token_order,
    }
    return [
        ("text", data),
        ("tokens of the training text", f"{config.data.train_tokens:,}"),
        ("optimizer steps", f"{step:,} of {settings.steps:,}"),
        ("sequences per step", f"{settings.batch_size:,}"),
        ("tokens per sequence", f"{settings.sequence_length:,}"),
        ("tokens seen", f"{step * settings.batch_size * settings.sequence_length:,}"),
        *((name, str(value)) for name, value in optional.items() if value is not None),
        (
            "optimizer",
            f"AdamW, betas {settings.beta1:g} and {settings.beta2:g}, decay {settings.weight_decay:g}",
        ),
        ("largest learning rate", f"{settings.learning_rate:g}, {settings.schedule} schedule"),
        ("precision", f"{settings.precision}, attention: {settings.attention_precision}"),
        ("seed", str(settings.seed)),
        ("trained with", ", ".join(f"{name} {version}" for name, version in config.versions.items())),
    ]


def _remarks(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the number of rollbacks, and which values were not finite, if there were any."""
    found = []
    if lines and lines[-1].get("attempt"):
        found.append(("rollbacks after spikes", str(lines[-1]["attempt"])))
    for key in ("loss", "validation_loss", "max_logit"):
        steps = [line["step"] for line in lines if line.get(key, 0) is None]
        if steps:
            found.append((f"first step whose {key.replace('_', ' ')} was not finite", f"{steps[0]:,}"))
    return found


def _losses(lines: Sequence[Mapping[str, Any]], step: int, data: str) -> list[Measurement]:
    """Return the last validation loss up to the step with its perplexity, and the best if it is another."""
    measured = [line for line in lines if line.get("validation_loss") is not None]
    if not measured:
        return []
    last, best = measured[-1], min(measured, key=lambda line: line["validation_loss"])
    of = None if last["step"] == step else f"step {last['step']:,}"
    loss = last["validation_loss"]
    found = [Measurement("validation loss (nats per token)", loss, of, "loss", data, _SPLIT)]
    perplexity = _perplexity(loss)
    if perplexity is not None:
        found.append(Measurement("perplexity (per token)", perplexity, of, "perplexity", data, _SPLIT))
    if best["step"] != last["step"]:
        name, loss = "lowest validation loss (nats per token)", best["validation_loss"]
        found.append(Measurement(name, loss, f"step {best['step']:,}", "loss", data, _SPLIT))
    return found


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # above, it exceeds a double


def _evaluations(run: Path, config: RunConfig, step: int, data: str) -> list[Measurement]:
    """Return what `longshort evaluate` measured of this step on the run's own data, of most tokens."""
    most: dict[str, Any] = {}
    for path in sorted((run / EVALUATION_FOLDER).glob(f"step-{step}-*.json")):
        try:
            content = json.loads(path.read_text())
            is_own = content["data"] == str(config.training.data) and content["note"] is None
            if is_own and content["tokens"] > most.get("tokens", 0):
                most = {key: content[key] for key in ("tokens", "context_length", *_EVALUATED)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the result of an evaluation: {error!r}") from error
    about = f"whole documents, context {most.get('context_length')}, {most.get('tokens', 0):,} tokens"
    return [
        Measurement(f"{name} ({about})", most[metric], None, metric, data, _SPLIT)
        for metric, name in _EVALUATED.items()
        if most.get(metric) is not None
    ]


def _logits(lines: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Return the largest logits of the training up to the step, over all heads and by their kind."""
    found = []
    for key, name in _LOGITS.items():
        # Other lines repeat what was measured last.
        measured = [line for line in lines if line.get(key) is not None and "max_logit_by_head" in line]
        if measured:
            line = max(measured, key=lambda line: line[key])
            found.append(Measurement(name, line[key], f"training, step {line['step']:,}"))
    return found
