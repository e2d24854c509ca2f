"""Checkpoints that a killed process or a full disk cannot damage.

`RUN/checkpoints/step-N/` is a `save_pretrained` folder of the model, and holds optimizer.safetensors (AdamW's
state by parameter name) and state.json too. It is written under a name that no reader takes for a checkpoint,
synced to the disk, and only then renamed. Nothing in it is pickled. A run that measures updates of query and
key weights has alarms.safetensors too: the weights from which the next update is measured.

If the model is cut into shards, each process writes its own, of weights and optimizer together, as
shard-*.safetensors, by torch.distributed.checkpoint. Any number of processes reads either kind, with a whole
model or one in shards.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from longshort.data.files import sync_folder, sync_tree
from longshort.distributed import put_values
from longshort.huggingface.progress_bars import without_progress_bars
from longshort.reporting.files import replace_file
from longshort.stability import UpdateEntropy
from longshort.training.parallel import Ranks
from longshort.training.sharding import is_sharded

FOLDER = "checkpoints"
_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_ALARMS = "alarms.safetensors"
_STATE = "state.json"
_SHARDS = "shard-*.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainState:
    """The state of a run beside weights and optimizer.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        seed: seed of the initial weights and of the batches.
        attempt: rollbacks so far.
        batches_skipped: batches that rollbacks left out; the next step takes batch `step + batches_skipped`.
        spikes: the state of the `SpikeDetector`; None if there is none.
    """

    step: int
    tokens: int
    seed: int
    attempt: int = 0
    batches_skipped: int = 0
    spikes: dict[str, Any] | None = None


def save_checkpoint(
    run: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    update_entropy: UpdateEntropy | None = None,
) -> Path:
    """Write `run/checkpoints/step-N`.

    Args:
        run: the run's folder.
        model: a PreTrainedModel.
        optimizer: AdamW over all parameters of the model, even before its first step.
        state: its `step` names the folder.
        update_entropy: its state is written too.

    Raises:
        FileExistsError: there is a checkpoint of this step.
        OSError: the disk is full, or the files cannot be written for another reason. Earlier checkpoints are
            untouched and nothing of the new one is left.
    """
    with _new_checkpoint(run, state) as partial:
        with without_progress_bars():
            model.save_pretrained(partial, max_shard_size="1TB", model_card=False)  # one file of weights
        save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
        if update_entropy is not None:
            save_file(update_entropy.state(), partial / _ALARMS)
    return checkpoint_folder(run, state.step)


def save_shards(
    run: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    ranks: Ranks,
    update_entropy: UpdateEntropy | None = None,
    *,
    in_background: bool = False,
) -> ShardsBeingSaved:
    """Begin to write `run/checkpoints/step-N` of a model that is cut into shards; all ranks call it.

    Args:
        run: as for `save_checkpoint`.
        model: as for `save_checkpoint`.
        optimizer: as for `save_checkpoint`.
        state: as for `save_checkpoint`.
        update_entropy: as for `save_checkpoint`.
        ranks: the processes.
        in_background: copy the shards to the CPU and let a thread write them. Otherwise they are written when
            this returns, but not yet synced and renamed.

    Returns:
        What is being saved; all ranks must call its `finish`.

    Raises:
        FileExistsError, OSError: as in `save_checkpoint`.
    """
    if ranks.is_main:
        partial = _begin(run, state)
        if update_entropy is not None:
            save_file(update_entropy.state(), partial / _ALARMS)
    ranks.barrier()  # the folder is there
    tensors = _weights(model) | {
        name: moment.reshape(1) if moment.ndim == 0 else moment
        for name, moment in _optimizer_tensors(model, optimizer).items()
    }
    writer = HuggingFaceStorageWriter(str(_partial(run, state.step)), save_distributed=True)
    future = None
    with _shard_errors(run, state):
        if in_background:
            future = async_save(tensors, storage_writer=writer, process_group=ranks.saving_group)
            assert isinstance(future, Future)
        else:
            save(tensors, storage_writer=writer)
    return ShardsBeingSaved(run, model.config, state, ranks, future)


@dataclass(frozen=True)
class ShardsBeingSaved:
    """A checkpoint in shards that is not renamed yet."""

    run: Path
    config: Any
    state: TrainState
    ranks: Ranks
    future: Future[Any] | None

    @property
    def is_written(self) -> bool:
        """Whether this rank's thread is done. The main one's is done when all are."""
        return self.future is None or self.future.done()

    def finish(self) -> None:
        """Wait for the thread; then the main rank syncs the files and renames the folder. No rank waits for
        another.

        Raises:
            OSError: the shards could not be written.
        """
        with _shard_errors(self.run, self.state):
            if self.future is not None:
                self.future.result()
            if self.ranks.is_main:
                self.config.save_pretrained(_partial(self.run, self.state.step))
                _complete(self.run, self.state)


@contextmanager
def _shard_errors(run: Path, state: TrainState) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise _not_written(run, state, cause) from error
    except OSError as error:
        raise _not_written(run, state, error) from error


@contextmanager
def _new_checkpoint(run: Path, state: TrainState) -> Iterator[Path]:
    """Give a folder whose files become the checkpoint, complete or not at all."""
    try:
        yield _begin(run, state)
        _complete(run, state)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise _not_written(run, state, error) from error


def _begin(run: Path, state: TrainState) -> Path:
    """Make the folder that is renamed when the checkpoint is complete."""
    final, partial = checkpoint_folder(run, state.step), _partial(run, state.step)
    if _is_complete(final):
        raise FileExistsError(f"{final} exists already")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _complete(run: Path, state: TrainState) -> None:
    """Make the folder the checkpoint of its step, at once."""
    final, partial = checkpoint_folder(run, state.step), _partial(run, state.step)
    (partial / _STATE).write_text(_as_json(state))
    sync_tree(partial)
    if final.exists():  # it lacks files, so the run was not resumed from it
        _remove(final)
    partial.rename(final)
    sync_folder(run / FOLDER)


def _not_written(run: Path, state: TrainState, error: BaseException) -> OSError:
    """Remove what is left of a checkpoint that could not be written; return the error to raise."""
    shutil.rmtree(_partial(run, state.step), ignore_errors=True)
    return OSError(
        f"the checkpoint of step {state.step} could not be written to {run / FOLDER}: {error}; "
        "the checkpoints before it are whole"
    )


def _partial(run: Path, step: int) -> Path:
    return run / FOLDER / f".step-{step}.partial"


def keep_checkpoints(run: Path, steps: Collection[int]) -> None:
    """Remove the complete checkpoints of all other steps.

    Raises:
        OSError: one could not be removed.
    """
    for step in checkpoint_steps(run):
        if step not in steps:
            _remove(run / FOLDER / f"step-{step}")


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints, in ascending order."""
    folder = run / FOLDER
    return [step for step in _steps(folder) if _is_complete(folder / f"step-{step}")]


def rewind(run: Path, step: int, attempt: int, batches_skipped: int) -> None:
    """Make the checkpoint of `step` the latest: the start of another attempt with other batches.

    Its state is rewritten first, then the later checkpoints are removed. If the process is killed in between,
    the latest checkpoint of the old attempt remains, and a run resumed from it rolls back the same way.

    Raises:
        OSError: a file could not be written or removed.
    """
    folder = run / FOLDER
    path = folder / f"step-{step}" / _STATE
    state = replace(_read_state(path), attempt=attempt, batches_skipped=batches_skipped)
    replace_file(path, _as_json(state).encode())
    sync_folder(path.parent)
    for later in _steps(folder):
        if later > step:
            _remove(folder / f"step-{later}")
    sync_folder(folder)


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    update_entropy: UpdateEntropy | None = None,
) -> TrainState:
    """Put a checkpoint's weights and optimizer state into a model and its AdamW, in place and bit by bit, and
    the state of `update_entropy` if it was saved with one.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the checkpoint is of another model.
    """
    state = _read_state(checkpoint / _STATE)
    optimizer.state.clear()
    if _has_shards(checkpoint):
        moments = {} if state.step == 0 else _new_moments(model)
        _read_shards(checkpoint, model, _weights(model) | moments)
    else:
        load_weights(checkpoint, model)
        moments = _read(checkpoint / _OPTIMIZER)
    if update_entropy is not None:
        update_entropy.restore(_read(checkpoint / _ALARMS))
    if state.step == 0:  # AdamW has nothing yet
        return state
    for name, parameter in model.named_parameters():
        missing = [f"{name}.{moment}" for moment in _MOMENTS if f"{name}.{moment}" not in moments]
        if missing:
            raise ValueError(f"{checkpoint / _OPTIMIZER} does not fit the model of this run: no {missing[0]}")
        optimizer.state[parameter] = {
            moment: _own(moment, moments[f"{name}.{moment}"], parameter) for moment in _MOMENTS
        }
    return state


def _own(name: str, moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of AdamW's state, of this name, as the optimizer of a parameter holds it."""
    if name == "step":
        moment = moment.reshape(())
    elif isinstance(parameter, DTensor) and not isinstance(moment, DTensor):
        part = torch.zeros_like(parameter.detach())
        put_values(part, moment)
        return part
    # Copied to memory that torch allocates: a mapped file's alignment could change the last bits of sums.
    return moment.to(parameter.device, copy=True)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model, in place and bit by bit.

    Raises:
        OSError: the file is missing or damaged.
        ValueError: the weights are those of another model.
    """
    if _has_shards(checkpoint):
        _read_shards(checkpoint, model, _weights(model))
        return
    if is_sharded(model):
        found = _read(checkpoint / _WEIGHTS)
        for name, parameter in model.named_parameters():
            if name not in found or found[name].shape != parameter.shape:
                raise ValueError(
                    f"{checkpoint} does not fit the model of this run: {name} is missing or differs"
                )
            put_values(parameter, found[name])
        return
    try:
        load_model(model, checkpoint / _WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"{checkpoint / _WEIGHTS} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the model of this run: {error}") from error


def latest_checkpoint(run: Path | str) -> Path | None:
    """Return the complete checkpoint of the highest step; None if there is none."""
    steps = checkpoint_steps(Path(run))
    return checkpoint_folder(run, steps[-1]) if steps else None


def checkpoint_folder(run: Path | str, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(run) / FOLDER / f"step-{step}"


def remove_partial_checkpoints(run: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (run / FOLDER).glob(".step-*.partial"):
        shutil.rmtree(path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path.parent} is damaged: {error}") from error


def _has_shards(checkpoint: Path) -> bool:
    return any(checkpoint.glob(_SHARDS))


def _read_shards(checkpoint: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Read tensors in place; if the model is cut into shards, all processes call it."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be here
            _require_all_parts(reader)
            load(tensors, storage_reader=reader, no_dist=not is_sharded(model))
    except (CheckpointException, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise OSError(f"{checkpoint} is damaged, or of another model: {error}") from error


def _require_all_parts(reader: HuggingFaceStorageReader) -> None:
    """Raise a ValueError if a file is missing: torch would leave its part of each tensor as it was."""
    for name, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in found.chunks) < found.size.numel():
            raise ValueError(f"a part of {name} is missing")


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _new_moments(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return tensors for AdamW's state, cut as the weights are."""
    return {
        f"{name}.{moment}": torch.zeros(1) if moment == "step" else torch.zeros_like(parameter.detach())
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def _as_json(state: TrainState) -> str:
    return json.dumps(asdict(state), indent=2, allow_nan=False) + "\n"


def _read_state(path: Path) -> TrainState:
    try:
        return TrainState(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise OSError(f"{path.parent} is damaged: {error}") from error


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name.group(1)) for name in names if name)


def _is_complete(checkpoint: Path) -> bool:
    has_whole = all((checkpoint / name).is_file() for name in (_WEIGHTS, _OPTIMIZER))
    has_state = all((checkpoint / name).is_file() for name in ("config.json", _STATE))
    return has_state and (has_whole or _has_shards(checkpoint))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; if the process is killed meanwhile, what is left is not taken for one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
