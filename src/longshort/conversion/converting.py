"""A converted model: its folder, and the measurements of its report, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Le
from safetensors.torch import save
from transformers import AutoConfig

from longshort.checks import check_fields
from longshort.conversion.heads import find_heads
from longshort.conversion.journal import Journal, hash_tokens
from longshort.conversion.measures import (
    continue_greedily,
    measure_latency,
    measure_losses,
    measure_needles,
)
from longshort.conversion.models import add_model_files
from longshort.conversion.text import cut_parts
from longshort.data.tokenization import first_token
from longshort.huggingface import apply
from longshort.huggingface.loading import Pretrained
from longshort.huggingface.state import stored_state, text_config
from longshort.reporting.files import replace_file

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    from longshort.layout import HeadLayout

HELD_OUT_FILE = "held_out.safetensors"
_CACHE_LENGTHS = tuple(2**power for power in range(9, 18))


@dataclass(frozen=True)
class ReportSizes:
    """The sizes of the measurements for a report.

    Attributes:
        lengths: tokens of the windows whose losses are compared; ascending.
        tokens: tokens in the windows of each length, about; at least two windows.
        latency_lengths: tokens in the cache when the time of a token is measured.
        latency_tokens: tokens to time at each.
        needle_lengths, needle_depths, needle_samples: see `longshort.evaluation.measure_needle`.
        prompt_tokens, sample_tokens: tokens of each text to continue, and of its continuation.
        samples: number of texts to continue.

    Raises:
        ValueError: a number is out of its range.
    """

    lengths: tuple[Annotated[int, Ge(2)], ...] = (256, 1024, 4096)
    tokens: Annotated[int, Ge(1)] = 8192
    latency_lengths: tuple[Annotated[int, Ge(1)], ...] = (1024, 4096)
    latency_tokens: Annotated[int, Ge(1)] = 16
    needle_lengths: tuple[Annotated[int, Ge(1)], ...] = (256, 1024)
    needle_depths: tuple[Annotated[float, Ge(0), Le(1)], ...] = (0.0, 0.5, 1.0)
    needle_samples: Annotated[int, Ge(2)] = 3
    prompt_tokens: Annotated[int, Ge(2)] = 256
    sample_tokens: Annotated[int, Ge(1)] = 64
    samples: Annotated[int, Ge(0)] = 2

    def __post_init__(self) -> None:
        check_fields(self, named=str)


@dataclass(frozen=True)
class Conversion:
    """The measurements of a report; `before` and `after` have equal keys.

    Attributes:
        losses: what `measure_losses` returns, `before` and `after`, by length.
        cache: bytes of the keys and values of one sequence by length, in the model's dtype, counted; the
            cache may reserve more.
        latency: what `measure_latency` returns, by length.
        needles: what `measure_needles` returns.
        samples: `prompt`, `before` and `after` of each text.
    """

    losses: dict[int, dict[str, Any]]
    cache: dict[int, dict[str, int]]
    latency: dict[int, dict[str, Any]]
    needles: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, str]] = field(default_factory=list)


def add_converted(pretrained: Pretrained, out: Path) -> None:
    """Write a model with its layouts, and its tokenizer, into a folder, unless they are there.

    Args:
        pretrained: the model, which attends by layouts; that of the folder has the same weights.
        out: the folder.

    Raises:
        FileExistsError: the folder holds a model with other layouts.
        OSError: a file could not be written.
    """
    if not (out / "config.json").exists():
        add_model_files(pretrained, out)
        return
    held = stored_state(
        AutoConfig.from_pretrained(out, trust_remote_code=False).get_text_config(decoder=True)
    )
    wanted = stored_state(text_config(pretrained.model))
    assert wanted is not None
    if held is None or held["layouts"] != wanted["layouts"]:
        raise FileExistsError(
            f"{out} holds a model with other layouts, of a conversion that was interrupted; choose another "
            "name, or remove it"
        )


def fit_sizes(sizes: ReportSizes, tokens: int, limit: int | None) -> ReportSizes:
    """Fit sizes to a text and a model.

    Args:
        sizes: what is wanted.
        tokens: the tokens of the text.
        limit: tokens that the model was made for; None: any number.

    Returns:
        The sizes without lengths that the text cannot fill or the model cannot take, and with samples that
        are shorter if they must be, or none.
    """

    def fitting(lengths: Sequence[int], windows: int, more: int = 0) -> tuple[int, ...]:
        return tuple(
            length
            for length in lengths
            if length * windows <= tokens and (limit is None or length + more <= limit)
        )

    sample_tokens, prompt_tokens = sizes.sample_tokens, tokens // max(1, sizes.samples)
    if limit is not None:
        sample_tokens = max(1, min(sample_tokens, limit // 2))
        prompt_tokens = min(prompt_tokens, limit - sample_tokens)
    fitted = {
        "sample_tokens": sample_tokens,
        "prompt_tokens": max(2, min(prompt_tokens, sizes.prompt_tokens)),
        "samples": sizes.samples if prompt_tokens >= 2 else 0,
        "lengths": fitting(sizes.lengths, 2),
        "latency_lengths": fitting(sizes.latency_lengths, 1, sizes.latency_tokens),
        "needle_lengths": fitting(sizes.needle_lengths, 1),
    }
    return ReportSizes(**{**vars(sizes), **fitted})


def draw_held_out(
    pretrained: Pretrained, tokens: Int64[Tensor, " tokens"], sizes: ReportSizes
) -> dict[str, Tensor]:
    """Cut the windows of a report from held-out text: `windows-LENGTH` of each length, and `prompts`."""
    first = first_token(pretrained.tokenizer)
    cut = {}
    for length in sizes.lengths:
        count = max(2, min(sizes.tokens, len(tokens)) // length)
        cut[f"windows-{length}"] = cut_parts(tokens, length, [count], first)[0]
    if sizes.samples:
        cut["prompts"] = cut_parts(tokens, sizes.prompt_tokens, [sizes.samples], first)[0]
    return cut


def measure_conversion(
    pretrained: Pretrained,
    layouts: Sequence[HeadLayout | None],
    tokens: Int64[Tensor, " tokens"],
    sizes: ReportSizes,
    journal: Journal,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Measure a model before and after its conversion, and leave it with the layouts.

    The windows are written to OUT/held_out.safetensors, so that others can repeat the losses.

    Args:
        pretrained: the model, without layouts, and its tokenizer.
        layouts: the layout of each layer.
        tokens: held-out text.
        sizes: what to measure; every length fits the text and the model.
        journal: finished measurements of this model on this text, which are not repeated.
        out: the folder of the converted model.
        progress: called with the number of measurements done, and of all.
    """
    held_out = draw_held_out(pretrained, tokens, sizes)
    replace_file(
        out / HELD_OUT_FILE, save({name: windows.contiguous() for name, windows in held_out.items()})
    )
    model = pretrained.model
    heads = find_heads(model)
    itemsize = model.dtype.itemsize
    measured: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    total = 2 * (len(sizes.lengths) + len(sizes.latency_lengths) + len(sizes.needle_lengths) + sizes.samples)
    done = 0

    def take(state: str, name: str, subject: Sequence[Any], measure: Callable[[], Any]) -> None:
        nonlocal done
        attends_by = repr(layouts) if state == "after" else None
        digest = hashlib.sha256(repr((subject, attends_by)).encode()).hexdigest()[:16]
        measured[state][name] = journal.remember(f"{state} {name} {digest}", measure)
        done += 1
        if progress is not None:
            progress(done, total)

    for state in ("before", "after"):
        if state == "after":
            apply(model, layouts)
        for length in sizes.lengths:
            windows = held_out[f"windows-{length}"]
            take(
                state,
                f"loss {length}",
                [hash_tokens(windows)],
                lambda windows=windows: measure_losses(model, windows),
            )
        for length in sizes.needle_lengths:
            options = ([length], sizes.needle_depths, sizes.needle_samples)
            take(
                state,
                f"needle {length}",
                options,
                lambda options=options: measure_needles(pretrained, tokens, *options),
            )
        for length in sizes.latency_lengths:
            take(
                state,
                f"latency {length}",
                [sizes.latency_tokens, model.device.type, torch.get_num_threads()],
                lambda length=length: measure_latency(model, tokens[:length], sizes.latency_tokens),
            )
        for index in range(sizes.samples):
            prompt = held_out["prompts"][index]
            take(
                state,
                f"sample {index}",
                [hash_tokens(prompt), sizes.sample_tokens],
                lambda prompt=prompt: continue_greedily(pretrained, prompt, sizes.sample_tokens),
            )

    def both(name: str) -> dict[str, Any]:
        return {state: measured[state][name] for state in measured}

    return Conversion(
        losses={length: both(f"loss {length}") for length in sizes.lengths},
        cache={
            length: {
                "before": heads.original_cache_bytes(length, itemsize),
                "after": heads.cache_bytes(layouts, length, itemsize),
            }
            for length in _CACHE_LENGTHS
        },
        latency={length: both(f"latency {length}") for length in sizes.latency_lengths},
        needles={
            state: [cell for length in sizes.needle_lengths for cell in measured[state][f"needle {length}"]]
            for state in measured
        },
        samples=[
            {
                "prompt": str(pretrained.tokenizer.decode(held_out["prompts"][index])),
                **both(f"sample {index}"),
            }
            for index in range(sizes.samples)
        ],
    )
