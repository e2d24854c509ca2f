"""The folder of a run: its settings are resolved, checked and written before the first step.

RUN/config.json        `RunConfig`: every setting, the model's config, which data, which versions
RUN/tokenizer/         a copy of the data's tokenizer
RUN/metrics.jsonl      see `longshort.training.metrics`
RUN/checkpoints/       see `longshort.training.checkpoints`
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from longshort import __version__
from longshort.data import DataFolder, DocumentStart, begins_with_end_of_text, load_tokenizer
from longshort.data.files import sync_folder, sync_tree
from longshort.model import LongShortConfig, LongShortForCausalLM, preset
from longshort.reporting.files import replace_file
from longshort.training.config import MODEL_SETTINGS, TrainConfig

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class DataIdentity:
    """The facts by which a resumed run recognises its data.

    Attributes:
        tokenizer_hash: hash of the tokenizer that made the tokens.
        train_tokens, validation_tokens: lengths of the two splits.
    """

    tokenizer_hash: str
    train_tokens: int
    validation_tokens: int

    @classmethod
    def of(cls, data: DataFolder) -> DataIdentity:
        """Return the identity of a prepared folder."""
        return cls(data.train.tokenizer_hash, len(data.train.tokens), len(data.validation.tokens))


@dataclass(frozen=True)
class RunConfig:
    """A run, resolved: RUN/config.json.

    Attributes:
        training: the settings, defaults filled in, paths absolute.
        model: `LongShortConfig` as a dictionary.
        band: window over which the global heads' logits are compared with local heads; None: they are not,
            since the model has no local head and its config no window.
        data: identity of the data that the run was started on.
        versions: versions of longshort and torch.
        document_start: where documents begin, if the run keeps them separate.
    """

    training: TrainConfig
    model: dict[str, Any]
    band: int | None
    data: DataIdentity
    versions: dict[str, str]
    document_start: DocumentStart = "at-end-of-text"

    def __post_init__(self) -> None:
        begins_with_end_of_text(self.document_start)  # checks it

    def build_model(self, device: Literal["cpu", "meta"] = "cpu") -> LongShortForCausalLM:
        """Build the model with the initial weights of the run's seed, on the CPU in fp32; or on the meta
        device, without weights."""
        with torch.random.fork_rng(devices=[]), torch.device(device):  # the weights drawn here are replaced
            model = LongShortForCausalLM(LongShortConfig.from_dict(self.model))
        if device == "cpu":
            model.draw_weights(self.training.seed)
        return model


def plan_run(settings: TrainConfig) -> tuple[RunConfig, DataFolder]:
    """Resolve settings and check all that can be checked without writing anything.

    Raises:
        ValueError: a setting does not fit the preset or the data.
        FileNotFoundError: there is no such data folder, or no such file to read the preset from.
        FileExistsError: the run's folder is in use.
    """
    _require_new(settings.out)
    data = DataFolder.open(settings.data)
    model = preset(
        settings.preset,
        mhsa=settings.mhsa,
        vocab_size=data.train.vocab_size,
        eos_token_id=load_tokenizer(data.tokenizer_dir).eos_token_id,
        **settings.model_overrides(),
    )
    resolved = {ours: getattr(model, theirs) for ours, theirs in MODEL_SETTINGS.items()}
    # A flag holds no value that differs by layer; `RunConfig.model` does.
    chosen = {name: value for name, value in resolved.items() if not isinstance(value, list)}
    if settings.mhsa:
        chosen.pop("global_heads", None)
    warmup_steps, schedule_steps, min_learning_rate = settings.schedule_or_defaults()
    training = replace(
        settings,
        **chosen,
        warmup_steps=warmup_steps,
        schedule_steps=schedule_steps,
        min_learning_rate=min_learning_rate,
        data=settings.data.absolute(),
        out=settings.out.resolve(),
        threads=torch.get_num_threads(),
    )
    run = RunConfig(
        training=training,
        model=json.loads(model.to_json_string(use_diff=False)),
        band=_band(model),
        data=DataIdentity.of(data),
        versions=current_versions(),
    )
    return run, data


def _band(model: LongShortConfig) -> int | None:
    """Return the largest window of a local head; without local heads, the window in the config, if any."""
    windows = [window for layout in model.head_layouts() for window in layout.windows if window is not None]
    named = model.local_window if isinstance(model.local_window, list) else [model.local_window]
    return max(windows or [window for window in named if window is not None], default=None)


def create_run(run: RunConfig, data: DataFolder) -> None:
    """Make the run's folder, complete or not at all.

    Raises:
        FileExistsError: it exists and is not empty.
    """
    out = run.training.out
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shutil.copytree(data.tokenizer_dir, partial / TOKENIZER_FOLDER)
        write_config(partial, run)
        sync_tree(partial)
        _require_new(out)
        partial.rename(out)
        sync_folder(out.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_run(run: Path | str) -> RunConfig:
    """Read a run's config.json; `training.out` is the present folder of the run.

    Raises:
        FileNotFoundError: the folder is not a run.
        ValueError: its config.json is damaged.
    """
    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_text())
        return RunConfig(
            training=TrainConfig(**{**content["training"], "out": Path(run).absolute()}),
            model=content["model"],
            band=content["band"],
            data=DataIdentity(**content["data"]),
            versions=content["versions"],
            # Earlier versions did not record it: all their documents began there.
            document_start=content.get("document_start", "after-end-of-text"),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not the config of a run: {error!r}") from error


def write_config(folder: Path, run: RunConfig) -> None:
    """Write a run's config.json; an old one is replaced at once or not at all."""
    content = json.dumps(asdict(run), indent=2, allow_nan=False, default=str)  # default: paths
    replace_file(folder / CONFIG_FILE, content.encode() + b"\n")
    sync_folder(folder)


def open_same_data(run: RunConfig, folder: Path | None = None) -> DataFolder:
    """Open the data that the run was started on.

    Args:
        run: the run.
        folder: where the data are now; None: where they were.

    Raises:
        FileNotFoundError: it was moved or removed.
        ValueError: it is not the same.
    """
    data = DataFolder.open(folder or run.training.data)
    found = DataIdentity.of(data)
    if found != run.data:
        raise ValueError(
            f"{data.path} is not the data that this run was started on: got {found}, expected {run.data}"
        )
    return data


def current_versions() -> dict[str, str]:
    """Return the versions of the packages that determine the numbers of a run."""
    return {"longshort": __version__, "torch": str(torch.__version__)}


def _require_new(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise FileExistsError(
            f"--out: {out} exists already; `longshort train --resume {out}` resumes a run, "
            "another --out starts a new one"
        )
