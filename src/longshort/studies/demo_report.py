"""The report of the demo: a table, a description in words, and one page with the figures."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from longshort.reporting.page import Figure, Report, Sample, Section, Table, number, write_page
from longshort.studies.demo import MODELS, PROMPT, SETTING, training_arguments
from longshort.training.plots import compare_runs, plot_loss_by_position

if TYPE_CHECKING:
    from pathlib import Path

    from longshort.studies.demo import DemoSettings, ModelResult

    Results = dict[str, ModelResult]

_CAPTIONS = {
    "loss": (
        "Loss",
        (
            "Training loss, faint, and its running mean, in nats per byte; dots are the loss on validation "
            "text. Both models start from the same weights and see the same batches."
        ),
    ),
    "logits": (
        "Attention logits",
        (
            "The largest absolute attention logit of each model, on a log scale. Dashed: the global heads "
            "(all heads of MHSA) over the pairs inside the local window alone."
        ),
    ),
    "heads": (
        "Heads at the end",
        (
            "The largest absolute logit of each head at the last step, on one colour scale. In LS-attention "
            "the last head of each layer is the global one."
        ),
    ),
    "position": (
        "Loss by position",
        (
            "Loss by the number of tokens of context, on the validation documents. Up to half the context "
            "these are beginnings of documents: few tokens, of their own kind."
        ),
    ),
}
_ALIKE = 0.005  # nats per token; less than the difference between two seeds


def result_table(results: Results) -> Table:
    """Make a table with one row per measure and one column per model."""
    rows = [
        ("parameters", [f"{result.parameters:,}" for result in results.values()]),
        ("validation loss (nats per byte)", [number(result.evaluation.loss) for result in results.values()]),
        ("perplexity (per byte)", [number(result.evaluation.perplexity) for result in results.values()]),
        ("bits per byte", [number(result.evaluation.bits_per_byte) for result in results.values()]),
        ("largest logit", [number(result.max_logit) for result in results.values()]),
        (
            "largest logit inside the window",
            [number(result.max_logit_in_band) for result in results.values()],
        ),
        ("tokens per second", [f"{result.tokens_per_second:,.0f}" for result in results.values()]),
        ("training time (seconds)", [f"{result.training_seconds:,.0f}" for result in results.values()]),
    ]
    return Table(("", *results), [(name, *cells) for name, cells in rows])


def describe_outcome(settings: DemoSettings, results: Results) -> list[str]:
    """Describe the results in words, whichever model did better."""
    local, full = (results[name] for name in MODELS)
    return [_on_loss(settings, local, full), _on_logits(local, full), _on_speed(local, full)]


def _on_loss(settings: DemoSettings, local: ModelResult, full: ModelResult) -> str:
    diverged = [
        f"the loss of {name} was not finite from step {result.first_not_finite:,} on"
        for name, result in zip(MODELS, (local, full), strict=True)
        if result.first_not_finite is not None
    ]
    if diverged:
        return f"Loss: {' and '.join(diverged)}."
    ours, theirs = local.evaluation.loss, full.evaluation.loss
    seen = settings.steps * settings.tokens_per_step
    numbers = f"LS-attention {ours:.3f}, MHSA {theirs:.3f} nats per byte"
    if abs(ours - theirs) < _ALIKE:
        verdict = "the two are alike"
    else:
        winner, better, worse = ("LS-attention", ours, theirs) if ours < theirs else ("MHSA", theirs, ours)
        verdict = f"{winner} is better by {worse - better:.3f} ({(worse - better) / worse:.1%})"
    return f"Loss: after {seen / 1e6:.1f} million bytes of text, on unseen documents, {verdict}: {numbers}."


def _on_logits(local: ModelResult, full: ModelResult) -> str:
    if local.max_logit is None or full.max_logit is None:
        return "Logits: they were not finite, or were not measured, in at least one model."
    ratio = full.max_logit / local.max_logit
    sizes = f"MHSA's largest attention logit is {full.max_logit:.0f}, LS-attention's {local.max_logit:.0f}"
    if ratio >= 1.1:
        verdict = f"{ratio:.1f} times smaller with LS-attention"
    elif ratio <= 1 / 1.1:
        verdict = f"{1 / ratio:.1f} times larger with LS-attention, against what the paper finds"
    else:
        verdict = "about the same"
    growth = "; ".join(
        f"{name}'s {_growth(result.logit_growth)}" for name, result in zip(MODELS, (local, full), strict=True)
    )
    text = f"Logits: {sizes}: {verdict}. Over the last third of the training {growth}."
    if local.max_logit_in_band and full.max_logit_in_band:
        text += (
            f" Over the pairs inside the local window alone, where the two look at the same pairs, it is "
            f"{full.max_logit_in_band:.0f} against {local.max_logit_in_band:.0f}."
        )
    return text


def _growth(factor: float | None) -> str:
    if factor is None:
        return "was not measured"
    if factor > 1.05:
        return f"grew by {factor - 1:.0%}"
    return f"fell by {1 - factor:.0%}" if factor < 0.95 else "stayed where it was"


def _on_speed(local: ModelResult, full: ModelResult) -> str:
    ratio = local.tokens_per_second / full.tokens_per_second
    if ratio >= 1.02:
        verdict = f"LS-attention trained {ratio:.2f} times as fast"
    elif ratio <= 1 / 1.02:
        verdict = f"MHSA trained {1 / ratio:.2f} times as fast"
    else:
        verdict = "both trained at the same speed"
    return (
        f"Speed: with one core each, {verdict}: {local.training_seconds:,.0f} s for LS-attention, "
        f"{full.training_seconds:,.0f} s for MHSA. A local head's work grows with the length of the "
        "sequence, a global head's with its square."
    )


def write_demo_report(settings: DemoSettings, results: Results) -> Path:
    """Draw both models together in each figure, and write OUT/report.html, one file.

    Raises:
        OSError: a file could not be written.
    """
    out = settings.out
    pictures = {
        file.stem: file for file in compare_runs({n: out / f for n, f in MODELS.items()}, out / "plots")
    }
    pictures["position"] = plot_loss_by_position(
        {name: result.evaluation for name, result in results.items()}, out / "plots" / "position.png"
    )
    report = Report(
        title="LS-attention and full attention, side by side",
        subtitle=f"The longshort demo: {settings.source}, {settings.steps:,} steps, seed {settings.seed}",
        sections=[
            Section("What happened", describe_outcome(settings, results), result_table(results)),
            *(
                Section(heading, figures=[Figure(pictures[stem], caption)])
                for stem, (heading, caption) in _CAPTIONS.items()
                if stem in pictures
            ),
            Section(
                "Samples",
                samples=[
                    Sample(name, PROMPT, result.sample) for name, result in results.items() if result.sample
                ],
            ),
            Section(
                "How this was run",
                [SETTING, "One seed and two small models are an illustration, no proof."],
                samples=[Sample("Commands", "", _commands(settings))],
            ),
        ],
    )
    return write_page(report, out)


def _commands(settings: DemoSettings) -> str:
    data = ["data", settings.source, "--out", str(settings.out / "data")]
    commands = [data, *(training_arguments(settings, folder) for folder in MODELS.values())]
    return "\n".join(shlex.join(["longshort", *command]) for command in commands)
