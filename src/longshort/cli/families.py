"""The command `longshort families`."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from transformers.utils import logging

from longshort.cli.errors import UsageError
from longshort.cli.flags import parse
from longshort.huggingface.families import FamilySupport, family_names, family_support
from longshort.reporting.console import progress_bar
from longshort.reporting.files import replace_file

_COLUMNS = ("use", "cache", "watch", "clip")

_INTRODUCTION = f"""\
# Families of decoders

`longshort families` wrote this page. It shows what works for the causal language models of
transformers {transformers.__version__}, tried on a small model of each with random weights, and on one with
sliding layers where the default config has none: *use* is `apply`, *cache* `generate()` with a split cache,
*watch* `LogitMonitor` and *clip* `QKClip`. A number refers to a reason below the table."""

# Replacements for what differs between models in reasons that are otherwise equal.
_NAMES = (
    (re.compile(r"\b\w+(ForCausalLM|LMHeadModel|LMHead)\b"), "the model"),
    (re.compile(r"the attention of .* ran"), "the attention of layers ran"),
    (re.compile(r"\S*\d\S* \([A-Z]\w*\)"), "a layer"),
)


@dataclass(frozen=True)
class FamiliesFlags:
    """Try what works for each family of transformers' decoders, on a small model of it with random weights.

    use: layouts; cache: generate() with a split cache; watch: LogitMonitor; clip: QKClip. The table has a
    tick where something works, else the number of a reason below the table.
    """

    types: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Model types, such as llama. Without any: all causal language models, which takes minutes."""

    out: Path | None = None
    """Markdown file to write; an existing one is replaced. None: print."""


def run(argv: list[str]) -> int:
    """Run the command.

    Raises:
        UsageError: a type is not one of transformers' causal language models.
        OSError: the file could not be written.
    """
    flags = parse(FamiliesFlags, "families", argv)
    known = family_names()
    unknown = sorted(set(flags.types) - set(known))
    if unknown:
        raise UsageError(f"types must be model types of causal language models, got {', '.join(unknown)}")
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny
    found: list[FamilySupport] = []
    untried: dict[str, str] = {}
    wanted = flags.types or tuple(known)
    with progress_bar() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, name in enumerate(wanted):
            report("families", number, len(wanted))
            try:
                found.append(family_support(name))
            except ValueError as error:
                untried[name] = str(error)
    text = _table(found, untried)
    if flags.out is None:
        print(text)
    else:
        replace_file(flags.out, text.encode())
    return 0


def _table(found: list[FamilySupport], untried: dict[str, str]) -> str:
    """Return the table in Markdown; equal reasons share a number."""
    reasons: dict[str, int] = {}

    def cell(support: FamilySupport, column: str) -> str:
        reason = getattr(support, column)
        if reason is None:
            return "✓"
        for specific, general in _NAMES:
            reason = specific.sub(general, reason)
        return str(reasons.setdefault(reason, len(reasons) + 1))

    lines = [*_INTRODUCTION.splitlines(), "", f"| family | {' | '.join(_COLUMNS)} |", "|---|---|---|---|---|"]
    lines += [
        f"| {support.model_type} | {' | '.join(cell(support, name) for name in _COLUMNS)} |"
        for support in found
    ]
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    if untried:
        lines += ["", "Not tried:", "", *(f"- {name}: {reason}" for name, reason in untried.items())]
    return "\n".join(lines) + "\n"
