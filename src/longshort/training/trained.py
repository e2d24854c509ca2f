"""Loading of a run's model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longshort.data import load_tokenizer, tokenizer_hash
from longshort.training.checkpoints import latest_checkpoint, load_weights
from longshort.training.run import TOKENIZER_FOLDER, RunConfig, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from longshort.model import LongShortForCausalLM


@dataclass(frozen=True)
class TrainedModel:
    """A model that a run trained, with its tokenizer.

    Attributes:
        model: model with the weights of the latest checkpoint, fp32, in eval mode.
        tokenizer: tokenizer of the data that it was trained on.
        config: config of the run.
        step: step of the checkpoint.
    """

    model: LongShortForCausalLM
    tokenizer: PreTrainedTokenizerFast
    config: RunConfig
    step: int


def open_trained(run: Path | str, device: torch.device | str = "cpu") -> TrainedModel:
    """Load the latest checkpoint of a run.

    Raises:
        FileNotFoundError: the folder is not a run, or has no checkpoint yet.
        OSError: the weights are damaged.
        ValueError: config, weights and tokenizer do not fit together.
    """
    config = read_run(run)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet; `longshort train --resume {run}` resumes it")
    tokenizer = Path(run) / TOKENIZER_FOLDER
    if tokenizer_hash(tokenizer) != config.data.tokenizer_hash:
        raise ValueError(f"{tokenizer} is not the tokenizer of the data that {run} was trained on")
    model = config.build_model()
    load_weights(checkpoint, model)
    return TrainedModel(
        model=model.to(device).eval(),  # pyright: ignore[reportArgumentType]
        tokenizer=load_tokenizer(tokenizer),
        config=config,
        step=int(checkpoint.name.removeprefix("step-")),
    )
