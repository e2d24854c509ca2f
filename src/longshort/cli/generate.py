"""`longshort generate`"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from longshort.cli.flags import parse
from longshort.evaluation import generate_text
from longshort.layout import require_integer
from longshort.training.config import require_seed
from longshort.training.parallel import connect
from longshort.training.trained import open_trained


@dataclass(frozen=True)
class GenerateFlags:
    """Let the latest checkpoint of a run go on with a prompt; the text appears as it is made."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""

    prompt: str = ""
    """Beginning of the text."""

    max_new_tokens: int | None = None
    """The text ends after so many tokens, or where the model ends it. None: 200, or as many as the model has
    positions for."""

    temperature: float | None = None
    """Divides the logits: below 1 safer text, above 1 wilder. None: 1."""

    top_k: int | None = None
    """Sample among the so many likeliest tokens. None: among all."""

    greedy: bool = False
    """Take the likeliest token each time."""

    seed: int = 0
    """Of the sampling."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    threads: int | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        require_seed("--seed", self.seed)
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"--prompt must be UTF-8 text, got {self.prompt!r}") from None
        for name in ("max_new_tokens", "top_k", "threads"):
            value = getattr(self, name)
            if value is not None:
                require_integer("--" + name.replace("_", "-"), value, minimum=1)
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be a number > 0, got {self.temperature}")
        if self.greedy and (self.temperature is not None or self.top_k is not None):
            raise ValueError("--greedy samples nothing: it does not go with --temperature or --top-k")


def run(arguments: list[str]) -> int:
    flags = parse(GenerateFlags, "generate", arguments)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        trained = open_trained(flags.run, ranks.device)
    pieces = generate_text(
        trained.model,
        trained.tokenizer,
        flags.prompt,
        max_new_tokens=flags.max_new_tokens,
        temperature=0.0 if flags.greedy else flags.temperature or 1.0,
        top_k=flags.top_k,
        seed=flags.seed,
        separate_documents=trained.config.training.separate_documents,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    print(flags.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
