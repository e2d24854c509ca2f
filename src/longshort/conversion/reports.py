"""Folders with the results of an inspection, a conversion and a healing: JSON, figures, a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshort.conversion.budget import Budget
from longshort.conversion.converting import HELD_OUT_FILE, Conversion
from longshort.conversion.healing import FOLDER, REPORT_FILE, Healing, read_healing
from longshort.conversion.inspection import Inspection, Measure, inspect_heads
from longshort.conversion.journal import Journal, fingerprint, hash_tokens
from longshort.conversion.layout_file import write_layouts
from longshort.conversion.plots import (
    draw_curve,
    draw_heads,
    draw_lines,
    draw_needles,
    draw_positions,
    draw_rises,
)
from longshort.reporting.files import replace_file, strict_json
from longshort.reporting.page import Figure, Report, Sample, Section, Table, write_page

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    from longshort.huggingface.loading import Pretrained
    from longshort.layout import HeadLayout

LAYOUT_FILE, JOURNAL_FILE, CONVERSION_FILE = "layout.json", "journal.jsonl", "conversion.json"
_FIGURES = "figures"


def inspect_into(
    out: Path,
    pretrained: Pretrained,
    parts: Sequence[Int64[Tensor, "count length"]],
    budget: Budget,
    *,
    window: int,
    sink_tokens: int,
    measure: Measure,
    about: Mapping[str, Any],
    progress: Callable[[float, float], None] | None = None,
) -> Inspection:
    """Inspect a model, see `inspect_heads`, and write OUT/layout.json, the figures and OUT/report.html.

    Measurements are kept in OUT/journal.jsonl, from which an interrupted inspection resumes, and which an
    inspection for another budget reuses.

    Args:
        about: the names of model and text, for the files.

    Raises:
        ValueError: OUT has the measurements of another model, text, window or number of sink tokens, or as
            for `inspect_heads`.
        OSError: a file could not be written.
    """
    subject = {
        "model": fingerprint(pretrained.model),
        "text": [hash_tokens(part) for part in parts],
        "window": window,
        "sink_tokens": sink_tokens,
    }
    with Journal(out / JOURNAL_FILE, subject) as journal:
        found = inspect_heads(
            pretrained.model,
            parts,
            budget,
            window=window,
            sink_tokens=sink_tokens,
            journal=journal,
            measure=measure,
            progress=progress,
        )
    write_layouts(out / LAYOUT_FILE, found.layouts, {**about, **inspection_content(found)})
    heads = draw_heads(
        found.heads,
        found.best.kept,
        {"worth of the distance": found.scores, "distant mass": found.mass},
        out / _FIGURES / "heads.png",
    )
    rises = {f"{p.name} ({len(p.kept)} global)": p.rises["report"] for p in found.proposals}
    bars = draw_rises(rises, next(iter(rises)), out / _FIGURES / "rises.png")
    page = Report(
        title=f"Heads of {about['model']}",
        subtitle=f"{budget}; local heads see {window} tokens and {sink_tokens} sink tokens",
        sections=[
            Section(
                paragraphs=[
                    (
                        "The rise of the loss against all heads global, in nats per token. Layouts were "
                        "searched on the ranking part of the text; the choice part decided which is "
                        "proposed; the report part was used for nothing else."
                    ),
                    *filter(None, [excess_text(found)]),
                ],
                table=proposal_table(found),
                figures=[Figure(bars, "Rise on the report part, by how the heads were ranked.")],
            ),
            Section(
                "Heads",
                figures=[
                    Figure(
                        heads,
                        "The worth of each key/value head's distance, from slopes at gates; its attention "
                        "to keys outside the window, a poor guide; and the heads that stay global.",
                    )
                ],
            ),
        ],
    )
    write_page(page, out)
    return found


def inspection_content(found: Inspection) -> dict[str, Any]:
    """Return the numbers of an inspection, for JSON."""
    return {
        "budget": str(found.budget),
        "window": found.window,
        "sink_tokens": found.sink_tokens,
        "proposed": found.best.name,
        "losses": found.losses,
        "proposals": [
            {
                "name": proposal.name,
                "global_kv_heads": [list(head) for head in sorted(proposal.kept)],
                "rises": proposal.rises,
            }
            for proposal in found.proposals
        ],
        "kv_heads": [
            {
                "layer": head.layer,
                "head": head.head,
                "score": found.scores[head],
                "mass": found.mass[head],
                "is_global": head in found.best.kept,
            }
            for head in found.heads.candidates
        ],
    }


def excess_text(found: Inspection) -> str | None:
    """Say that the loss rises too much on the report part; None if it does not."""
    if not found.excess:
        return None
    return (
        f"on the report part the loss rises by {found.best.rises['report']:.4f}, {found.excess:.4f} above "
        "the limit; the layout keeps to it on the other two. More windows would give a better estimate."
    )


def proposal_table(found: Inspection) -> Table:
    """Return the layouts with their global heads, the layers without one, and rises of the loss by part."""
    rows = []
    for proposal in found.proposals:
        layers = {head.layer for head in found.heads.candidates}
        local = len(layers - {head.layer for head in proposal.kept})
        count = f"{len(proposal.kept)} of {len(found.heads.candidates)}"
        rises = (f"{proposal.rises[part]:+.4f}" for part in ("ranking", "choice", "report"))
        name = f"{proposal.name} (proposed)" if proposal is found.best else proposal.name
        rows.append((name, count, f"{local} of {len(layers)}", *rises))
    header = ("ranked by", "global KV heads", "layers all local", "ranking", "choice", "report")
    return Table(header, rows)


def write_conversion(
    out: Path,
    conversion: Conversion,
    layouts: Sequence[HeadLayout | None],
    about: Mapping[str, Any],
) -> Path:
    """Write OUT/layout.json, the figures, OUT/report.html and at last OUT/conversion.json; return the page.

    Raises:
        OSError: a file could not be written.
    """
    folder = out / _FIGURES
    sections = [Section("Loss", table=_loss_table(conversion))]
    if conversion.losses:
        longest = conversion.losses[max(conversion.losses)]
        picture = draw_positions(
            longest["before"]["by_position"], longest["after"]["by_position"], folder / "positions.png"
        )
        caption = f"The loss by position in windows of {max(conversion.losses):,} tokens."
        sections.append(Section(figures=[Figure(picture, caption)]))
    cache = {
        state: [(float(length), size[state] / 2**20) for length, size in conversion.cache.items()]
        for state in ("before", "after")
    }
    caption = "Keys and values by length; the cache may reserve up to a quarter more."
    picture = draw_lines(cache, "Cache of one sequence", "tokens", "MiB", folder / "cache.png")
    sections.append(
        Section(
            "Cache and latency",
            table=_cost_table(conversion),
            figures=[Figure(picture, caption)],
        )
    )
    if conversion.needles["before"]:
        picture = draw_needles(
            conversion.needles["before"], conversion.needles["after"], folder / "needles.png"
        )
        caption = "How much more likely a needle in the text makes its value, in nats per token."
        sections.append(Section("Needles", figures=[Figure(picture, caption)]))
    if conversion.samples:
        samples = [
            Sample(f"{state}, text {number}", sample["prompt"][-300:], sample[state])
            for number, sample in enumerate(conversion.samples, start=1)
            for state in ("before", "after")
        ]
        sections.append(Section("Samples", ["Continued with the likeliest tokens."], samples=samples))
    page = Report(
        title=f"Conversion of {about['model']}",
        subtitle=f"Before and after, text: {about['text']}",
        sections=sections,
    )
    written = write_page(page, out)
    loss = f"mean cross-entropy in nats of all tokens but the first of each window of {HELD_OUT_FILE}"
    finish_conversion(out, layouts, {**about, "loss": loss, **asdict(conversion)})
    return written


def finish_conversion(out: Path, layouts: Sequence[HeadLayout | None], content: Mapping[str, Any]) -> None:
    """Write OUT/layout.json and OUT/conversion.json, which marks a conversion as complete.

    Args:
        out: folder of the converted model.
        layouts: the layout of each layer.
        content: the content of conversion.json.

    Raises:
        OSError: a file could not be written.
    """
    about = {name: content[name] for name in ("model", "text")}
    write_layouts(out / LAYOUT_FILE, layouts, about)
    replace_file(out / CONVERSION_FILE, strict_json(_with_text_keys(content)).encode())


def loss_rows(conversion: Conversion) -> list[tuple[str, ...]]:
    """Return rows of length, tokens, loss before, after, and the rise."""
    return [
        (
            f"{length:,}",
            f"{both['before']['tokens']:,}",
            f"{both['before']['loss']:.4f}",
            f"{both['after']['loss']:.4f}",
            f"{both['after']['loss'] - both['before']['loss']:+.4f}",
        )
        for length, both in conversion.losses.items()
    ]


def write_healing(model: Path, healing: Healing) -> Path:
    """Write MODEL/healing/report.html with the curve; return the page.

    Raises:
        OSError: a file could not be written.
    """
    out = model / FOLDER
    curves = {"converted": healing.healed.lines}
    if healing.reference is not None:
        curves["original, trained as long"] = healing.reference.lines
    picture = draw_curve(curves, {"original": healing.original}, out / _FIGURES / "curve.png")
    page = Report(
        title=f"Healing of {model.resolve().name}",
        subtitle=f"{healing.healed.step:,} steps, {healing.healed.seconds / 60:.1f} minutes",
        sections=[
            Section(
                table=Table(("held-out loss", "nats per token", "above the original"), healing_rows(healing)),
                figures=[Figure(picture, "The loss on held-out text while the model is trained.")],
            )
        ],
    )
    return write_page(page, out)


def unreported_healing(model: Path) -> Healing | None:
    """Return the healing of a model that is complete, but has no report, since that was interrupted."""
    return None if (model / FOLDER / REPORT_FILE).exists() else read_healing(model)


def healing_rows(healing: Healing) -> list[tuple[str, str, str]]:
    """Return rows of name, loss, and difference to the original."""
    losses = {
        "original": healing.original,
        "converted": healing.healed.lines[0]["held_out_loss"],
        "healed": healing.healed.last_held_out,
    }
    if healing.reference is not None:
        losses["original, trained as long"] = healing.reference.last_held_out
    return [(name, f"{loss:.4f}", f"{loss - healing.original:+.4f}") for name, loss in losses.items()]


def _loss_table(conversion: Conversion) -> Table:
    return Table(("window", "tokens scored", "before", "after", "rise"), loss_rows(conversion))


def _cost_table(conversion: Conversion) -> Table:
    rows = []
    for length, size in conversion.cache.items():
        times = conversion.latency.get(length)
        shown = ["", ""]
        if times is not None:
            shown = [f"{1000 * times[state]['seconds_per_token']:.1f} ms" for state in ("before", "after")]
        rows.append(
            (
                f"{length:,}",
                f"{size['before'] / 2**20:.1f} MiB",
                f"{size['after'] / 2**20:.1f} MiB",
                f"{size['after'] / size['before']:.1%}",
                *shown,
            )
        )
    header = ("tokens", "cache before", "after", "share", "time of a token before", "after")
    return Table(header, rows)


def _with_text_keys(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _with_text_keys(value) for key, value in content.items()}
    return content
