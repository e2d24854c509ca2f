"""Loading of a run's model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longshort.data import load_tokenizer, tokenizer_hash
from longshort.training.checkpoints import checkpoint_folder, checkpoint_steps, load_weights
from longshort.training.run import TOKENIZER_FOLDER, RunConfig, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from longshort.model import LongShortForCausalLM


@dataclass(frozen=True)
class TrainedModel:
    """A model that a run trained, with its tokenizer.

    Attributes:
        model: model with the weights of the checkpoint, fp32, in eval mode.
        tokenizer: tokenizer of the data that it was trained on.
        config: config of the run.
        step: step of the checkpoint.
    """

    model: LongShortForCausalLM
    tokenizer: PreTrainedTokenizerFast
    config: RunConfig
    step: int


def open_trained(
    run: Path | str, device: torch.device | str = "cpu", step: int | None = None
) -> TrainedModel:
    """Load a checkpoint of a run.

    Args:
        run: the run's folder.
        device: device for the model.
        step: step of the checkpoint; None: the latest.

    Raises:
        FileNotFoundError: the folder is not a run, or has no checkpoint yet.
        OSError: the weights are damaged.
        ValueError: config, weights and tokenizer do not fit together, or there is no checkpoint of the step.
    """
    config = read_run(run)
    steps = checkpoint_steps(Path(run))
    if not steps:
        raise FileNotFoundError(f"{run} has no checkpoint yet; `longshort train --resume {run}` resumes it")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}")
    tokenizer = Path(run) / TOKENIZER_FOLDER
    if tokenizer_hash(tokenizer) != config.data.tokenizer_hash:
        raise ValueError(f"{tokenizer} is not the tokenizer of the data that {run} was trained on")
    model = config.build_model()
    load_weights(checkpoint_folder(run, step), model)
    return TrainedModel(
        model=model.to(device).eval(),  # pyright: ignore[reportArgumentType]
        tokenizer=load_tokenizer(tokenizer),
        config=config,
        step=step,
    )
