"""The command `longshort evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from annotated_types import Ge
from rich.table import Table

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.data import DataFolder
from longshort.evaluation import Evaluation, evaluate_documents
from longshort.reporting.console import console, progress_bar
from longshort.reporting.files import replace_file, require_new_files, strict_json
from longshort.training.parallel import Ranks, connect
from longshort.training.plots import plot_loss_by_position
from longshort.training.trained import TrainedModel, open_trained

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class EvaluateFlags:
    """Measure the latest checkpoint of a run on whole validation documents: loss, perplexity, bits per byte,
    and the loss by position in the context.

    Long documents are read in windows that overlap by half; each token is scored once, with at least half a
    context before it, or the whole beginning of the document. The numbers are also written to RUN/evaluation,
    as JSON and as a plot.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""

    data: Path | None = None
    """Folder with the validation documents. None: that of the run."""

    context: Annotated[int, Ge(1)] | None = None
    """Tokens per window. None: the sequence length of the training."""

    batch_size: Annotated[int, Ge(1)] | None = None
    """Windows per forward pass; it does not change the result. None: about 8192 tokens."""

    max_tokens: Annotated[int, Ge(1)] | None = None
    """Tokens into which the scored documents, from the first on, must fit; at least one is scored. None: all
    documents."""

    json: Path | None = None
    """File for the numbers, instead of the one in RUN/evaluation; it must not exist."""

    plot: Path | None = None
    """PNG file for the plot, instead of the one in RUN/evaluation; it must not exist."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    context_parallel: Annotated[int, Ge(1)] = 1
    """Processes that share each window: all that torchrun started."""

    gather_memory: Annotated[int, Ge(0)] | None = None
    """With --context-parallel, bytes that the gathered keys and values of one layer's global heads may take;
    beyond that they go round in a ring. None: any."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> int:
    flags = parse(EvaluateFlags, "evaluate", arguments)
    require_new_files(flags.json, flags.plot)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    shared = {"context_parallel": flags.context_parallel, "gather_memory": flags.gather_memory}
    with connect(flags.device, **shared) as ranks:
        return _evaluate(flags, ranks)


def _evaluate(flags: EvaluateFlags, ranks: Ranks) -> int:
    if ranks.data_size > 1:
        raise ValueError(
            f"--context-parallel must be the number of processes, {ranks.world_size}, "
            f"got {flags.context_parallel}"
        )
    trained = open_trained(flags.run, ranks.device)
    if ranks.context is not None:
        ranks.context.distribute(trained.model)
    settings = trained.config.training
    data = DataFolder.open(flags.data or settings.data)
    if data.validation.tokenizer_hash != trained.config.data.tokenizer_hash:
        raise ValueError(
            f"{data.path} was made with another tokenizer than the one that {flags.run} was trained on"
        )
    context = flags.context or settings.sequence_length
    assert context is not None
    with (
        progress_bar() as show,
        torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
    ):
        evaluation = evaluate_documents(
            trained.model,
            data.validation,
            context_length=context,
            batch_size=flags.batch_size,
            max_tokens=flags.max_tokens,
            separate_documents=settings.separate_documents,
            document_start=trained.config.document_start,
            context=ranks.context,
            progress=lambda done, total: show("evaluating", done, total),
        )
    if not ranks.is_main:
        return 0
    output = console()
    _print_table(output, evaluation, trained.step, data.validation.documents)
    note = _note(settings.token_order)
    if note is not None:
        output.print(note, markup=False)
    stem = flags.run / "evaluation" / _stem(flags, trained.step, context)
    json_file = flags.json or stem.with_suffix(".json")
    plot_file = flags.plot or stem.with_suffix(".png")
    replace_file(json_file, strict_json(_content(evaluation, flags, trained, data) | {"note": note}).encode())
    plot_loss_by_position({flags.run.resolve().name: evaluation}, plot_file)
    output.print(f"numbers: {json_file}\nplot:    {plot_file}", markup=False)
    return 0


def _note(token_order: str) -> str | None:
    """Return a remark on the numbers that their reader must know, if there is one."""
    if token_order == "text":
        return None
    return f"trained with --token-order {token_order}, but measured here on plain text"


def _stem(flags: EvaluateFlags, step: int, context: int) -> str:
    parts = [f"step-{step}", f"context-{context}"]
    if flags.max_tokens is not None:
        parts.append(f"tokens-{flags.max_tokens}")
    if flags.data is not None:
        parts.append(flags.data.resolve().name)
    return "-".join(parts)


def _print_table(output: Console, evaluation: Evaluation, step: int, documents: int) -> None:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("loss (nats per token)", f"{evaluation.loss:.4f}"),
        ("perplexity", f"{evaluation.perplexity:,.3f}"),
        ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
        ("tokens scored", f"{evaluation.tokens:,}"),
        ("documents", f"{evaluation.documents:,} of {documents:,}"),
        ("context length", f"{evaluation.context_length:,}"),
        ("after step", f"{step:,}"),
    ):
        table.add_row(name, value)
    output.print(table)


def _content(
    evaluation: Evaluation, flags: EvaluateFlags, trained: TrainedModel, data: DataFolder
) -> dict[str, Any]:
    return {
        "run": str(flags.run.absolute()),
        "step": trained.step,
        "data": str(data.path.absolute()),
        "max_tokens": flags.max_tokens,
        "precision": trained.config.training.precision,
        **asdict(evaluation),
    }
