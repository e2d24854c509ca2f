"""The command `longshort generate`."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from annotated_types import Ge, Gt

from longshort.checks import check_fields
from longshort.cli.flags import parse
from longshort.cli.units import format_bytes
from longshort.evaluation import generate_text
from longshort.reporting.files import parse_json_line
from longshort.training.config import Seed
from longshort.training.parallel import connect
from longshort.training.trained import open_trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longshort.evaluation import GeneratedText, GenerationStatistics


@dataclass(frozen=True)
class GenerateFlags:
    """Continue a prompt, or each of many, with the latest checkpoint of a run. The text is printed as it is
    generated, and at the end the speed is printed to stderr."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""

    prompt: str | None = None
    """Beginning of the text. None, and no file: the model writes from the start."""

    prompt_file: Path | None = None
    """File with the beginning of the text, UTF-8; - is stdin."""

    each_line: bool = False
    """Take each line of the file, or in a .jsonl file the "prompt" of each object, as a separate prompt.
    Empty lines are skipped."""

    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens to generate; the model may end the text earlier. None: 200, or fewer if the model has no
    more positions."""

    temperature: Annotated[float, Gt(0)] | None = None
    """Divisor of the logits: below 1 the text is more predictable, above 1 more random. None: 1."""

    top_k: Annotated[int, Ge(1)] | None = None
    """Sample only among this many likeliest tokens. None: among all."""

    greedy: bool = False
    """Take the likeliest token each time."""

    seed: Seed = 0
    """Seed of the sampling, the same for each prompt."""

    prefill_chunk: Annotated[int, Ge(1)] | None = None
    """Number of prompt tokens to read at a time; fewer take less memory and give the same text. None: as many
    as take 32 MiB of activations on a CPU, 512 MiB elsewhere."""

    json: bool = False
    """Print a JSON object for each prompt when its text is done, and no text before."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompt is not None:
            _require_text("--prompt", self.prompt)
            if self.prompt_file is not None:
                raise ValueError("--prompt and --prompt-file exclude each other, got both")
        if self.each_line and self.prompt_file is None:
            raise ValueError("--each-line is about the lines of --prompt-file, which is not given")
        if self.greedy and (self.temperature is not None or self.top_k is not None):
            raise ValueError("--greedy samples nothing: it does not go with --temperature or --top-k")


def run(arguments: list[str]) -> int:
    flags = parse(GenerateFlags, "generate", arguments)
    prompts = _prompts(flags)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        trained = open_trained(flags.run, ranks.device)
    texts = [
        generate_text(
            trained.model,
            trained.tokenizer,
            prompt,
            max_new_tokens=flags.max_new_tokens,
            temperature=0.0 if flags.greedy else flags.temperature or 1.0,
            top_k=flags.top_k,
            seed=flags.seed,
            separate_documents=trained.config.training.separate_documents,
            document_start=trained.config.document_start,
            prefill_chunk=flags.prefill_chunk,
        )
        for prompt in prompts
    ]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    for prompt, text in zip(prompts, texts, strict=True):
        if flags.json:
            print(json.dumps(_record(prompt, text, flags.seed)), flush=True)
        else:
            _print_text(prompt, text)
    print(_summary([text.statistics for text in texts]), file=sys.stderr)
    return 0


def _prompts(flags: GenerateFlags) -> list[str]:
    """Read the prompts that the flags name, at least one.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8 text, a line of it has no prompt, or all are empty.
    """
    path = flags.prompt_file
    if path is None:
        return [flags.prompt or ""]
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {path} must be UTF-8 text, got {error.reason} at {error.start}"
        ) from None
    if not flags.each_line:
        return [text]
    # not splitlines(), which also splits at characters that a prompt may hold
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {path} must hold a prompt, got empty lines only")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, path, number) for number, line in lines]


def _prompt_of(line: str, path: Path, number: int) -> str:
    prompt = parse_json_line(line, path, number, key="prompt")["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"{path}, line {number}: prompt must be a string, got {type(prompt).__name__}")
    _require_text(f"{path}, line {number}: prompt", prompt)
    return prompt


def _require_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {text!r}") from None


def _print_text(prompt: str, text: GeneratedText) -> None:
    print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()


def _record(prompt: str, text: GeneratedText, seed: int) -> dict[str, str | int | float | None]:
    made = "".join(text)
    statistics = text.statistics
    return {
        "prompt": prompt,
        "text": made,
        "tokens": statistics.tokens,
        "prompt_tokens": statistics.prompt_tokens,
        "seconds_to_first_token": statistics.seconds_to_first_token,
        "tokens_per_second": statistics.tokens_per_second,
        "cache_bytes": statistics.cache_bytes,
        "seed": seed,
    }


def _summary(all_statistics: Sequence[GenerationStatistics]) -> str:
    """Summarize all prompts in one line."""
    count = len(all_statistics)
    tokens = sum(each.tokens for each in all_statistics)
    first = sum(each.seconds_to_first_token or 0.0 for each in all_statistics) / count
    seconds = sum(each.seconds_after for each in all_statistics)
    cache = format_bytes(max(each.cache_bytes for each in all_statistics))
    speed = f", then {(tokens - count) / seconds:.4g} tokens/s" if tokens > count else ""
    if count == 1:
        return f"{tokens} tokens: first token after {first:.3g} s{speed}, cache {cache}"
    return (
        f"{count} prompts, {tokens} tokens: first token after {first:.3g} s (mean){speed}, cache {cache} "
        "(largest)"
    )
