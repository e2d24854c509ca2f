"""Training on a GPU: no step waits for it that has no line, and it computes what a CPU does."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longshort.backends import triton
from longshort.data import prepare
from longshort.training.config import TrainConfig
from longshort.training.loop import Progress, train
from longshort.training.metrics import read_metrics
from longshort.training.parallel import Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda", 0)
# The compiler itself looks at .grad of what enters its graph behind the monitor.
OF_COMPILER = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
SETTINGS: dict[str, Any] = {
    "plain": {},
    "bf16": {"precision": "bf16", "z_loss": 1e-4, "micro_batch_size": 3},
    "documents": {"separate_documents": True, "short_convolution": 3, "sink_tokens": 2},
    "remedies": {"qk_clip": 0.5, "qk_learning_rate_factor": 0.5, "sink_logits": True},
    "checkpointing": {"gradient_checkpointing": True, "position_embedding": "rope"},
    "compiled": {"compile": True, "precision": "bf16", "z_loss": 1e-4, "separate_documents": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of bytes, of words that repeat."""
    folder, choose = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for index in range(20):
        words = choose.choices(["the", "a", "cat", "dog", "sees", "hears", "under", "hill"], k=300)
        (folder / f"{index}.txt").write_text(" ".join(words))
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(folder, out, validation_fraction=0.2)
    return out


@pytest.fixture
def settings_for(data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of seconds; keyword arguments replace some of them."""

    def build(name: str = "run", **changes: Any) -> TrainConfig:
        small: dict[str, Any] = {
            "preset": "tiny", "data": data, "out": tmp_path / name, "sequence_length": 128, "window": 16,
            "hidden_size": 64, "heads": 4, "head_dim": 16, "steps": 12, "batch_size": 8, "log_every": 12,
            "monitor_every": 6, "evaluate_every": 12, "validation_windows": 4, "checkpoint_every": 12,
            "learning_rate": 3e-3, "device": "cuda",
        }  # fmt: skip
        return TrainConfig(**{**small, **changes})

    return build


@pytest.fixture
def error_on_waiting() -> Iterator[None]:
    """Leave torch as it was, whatever a test has made of what waits."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class Watching(Progress):
    """Makes it an error to wait for the GPU in steps without a line, once each kind of step was taken."""

    def __init__(self) -> None:
        self.watched: list[int] = []

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        is_watched = step + 1 in (3, 4, 5, 7, 8, 9, 10, 11)
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        if is_watched:
            self.watched.append(step + 1)


@OF_COMPILER
@pytest.mark.usefixtures("error_on_waiting")
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_steps_without_a_line_do_not_wait(
    settings_for: Callable[..., TrainConfig], changes: dict[str, Any]
) -> None:
    reason = triton.missing(GPU)
    if reason is not None:
        pytest.skip(f"the backend blockwise waits, and {reason}")
    watching = Watching()
    settings = settings_for(**changes)
    assert train(settings, watching).step == 12
    assert len(watching.watched) == 8
    lines = read_metrics(settings.out)
    assert [line["step"] for line in lines] == [1, 6, 12]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.usefixtures("error_on_waiting")
def test_batches_are_copied_without_waiting() -> None:
    values = torch.arange(1000)[::2]
    torch.cuda.set_sync_debug_mode("error")
    copied = Ranks(GPU).put(values)
    torch.cuda.set_sync_debug_mode("default")
    assert copied.device == GPU
    assert torch.equal(copied.cpu(), values)


def test_a_gpu_computes_what_a_cpu_does(settings_for: Callable[..., TrainConfig]) -> None:
    lines = []
    for device in ("cpu", "cuda"):
        settings = settings_for(device, device=device, log_every=1, monitor_every=1, z_loss=1e-4)
        train(settings)
        lines.append(read_metrics(settings.out))
    for on_cpu, on_gpu in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "max_logit"):
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-3)
    assert lines[1][-1]["validation_loss"] == pytest.approx(lines[0][-1]["validation_loss"], rel=1e-3)


@OF_COMPILER
@pytest.mark.slow
def test_it_learns_in_bf16_compiled(settings_for: Callable[..., TrainConfig]) -> None:
    changes = {"steps": 60, "log_every": 10, "evaluate_every": 60, "checkpoint_every": 60}
    losses = []
    for name, fast in (("plain", {}), ("fast", {"precision": "bf16", "compile": True})):
        settings = settings_for(name, **changes, **fast)
        train(settings)
        losses.append(read_metrics(settings.out)[-1]["validation_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
