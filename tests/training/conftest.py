"""A small prepared corpus, and runs on it."""

import random
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import SettingsFor

from longshort.data import prepare
from longshort.training.config import TrainConfig

_WORDS = ["the", "a", "cat", "dog", "sees", "hears", "sleeps", "and", "under", "hill", "slowly", "def"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of bytes: about 40 documents of a few hundred to a few thousand characters."""
    folder = tmp_path_factory.mktemp("corpus")
    choose = random.Random(0)
    for index in range(40):
        words = choose.choices(_WORDS, k=choose.randrange(50, 500))
        (folder / f"{index}.txt").write_text(" ".join(words))
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(folder, out, validation_fraction=0.2)
    return out


@pytest.fixture
def settings_for(data: Path, tmp_path: Path) -> SettingsFor:
    """Settings of a run of seconds in a fresh folder; keyword arguments replace some of them."""

    def build(name: str = "run", **changes: Any) -> TrainConfig:
        small: dict[str, Any] = {
            "preset": "tiny", "data": data, "out": tmp_path / name, "sequence_length": 48, "window": 8,
            "hidden_size": 32, "heads": 4, "head_dim": 8, "steps": 12, "batch_size": 4, "log_every": 1,
            "monitor_every": 4, "evaluate_every": 6, "validation_windows": 4, "checkpoint_every": 5,
            "learning_rate": 3e-3, "threads": 1, "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**{**small, **changes})

    return build
