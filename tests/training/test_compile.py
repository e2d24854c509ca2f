"""How many graphs `--compile` makes of a training, and that they compute what the training does."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longshort.data import Batch
from longshort.model import LongShortForCausalLM, preset
from longshort.stability import AttentionMonitor
from longshort.training.config import TrainConfig
from longshort.training.job import checkpoint_activations
from longshort.training.optimization import (
    Objective,
    learning_rate_at,
    make_optimizer,
    optimizer_step,
    validation_loss,
)
from longshort.training.parallel import Ranks

ALONE = Ranks(torch.device("cpu"))
LENGTH = 40

# The compiler itself looks at .grad of what enters its graph behind the monitor.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 2},
    "all": {"z_loss": 1e-2, "separate_documents": True, "micro_batch_size": 2, "precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True, "z_loss": 1e-2},
}


def batch(seed: int, size: int = 4) -> Batch:
    tokens = torch.randint(257, (size, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    segment_ids = (torch.arange(LENGTH) >= 15).long().expand(size, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], segment_ids)


class Training:
    """Steps of a small model, watched or not."""

    def __init__(self, layers: int = 2, **changes: Any) -> None:
        self.settings = TrainConfig(
            preset="tiny", data=Path("data"), out=Path("run"), batch_size=4, steps=30, learning_rate=3e-3,
            **changes,
        )  # fmt: skip
        config = preset(
            "tiny", max_position_embeddings=LENGTH, hidden_size=32, num_attention_heads=2, local_window=8,
            num_hidden_layers=layers,
        )  # fmt: skip
        model = LongShortForCausalLM(config).train()
        model.draw_weights(0)
        if self.settings.gradient_checkpointing:
            checkpoint_activations(model)
        self.objective = Objective(model, self.settings)
        self.monitor = AttentionMonitor(model, 8)
        self._optimizer = make_optimizer(model, self.settings)

    def step(self, number: int, is_monitored: bool = False) -> float:
        """Loss of the step, and the largest logit if it is watched."""
        rate = learning_rate_at(self.settings, number)
        with self.monitor.observing() if is_monitored else nullcontext():
            loss, norm = optimizer_step(
                self.objective, self._optimizer, batch(number), rate, self.settings, ALONE
            )
        found = loss.item() + norm.item()
        return found + self.monitor.reading().max_logit if is_monitored else found

    def validate(self) -> float:
        return validation_loss(self.objective, batch(0), self.settings, ALONE)


def compiled(training: Training, **options: Any) -> CompileCounterWithBackend:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    training.objective.compile(backend=counter, **options)
    return counter


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[] if name in ("plain", "all") else [pytest.mark.slow])
        for name, changes in SETTINGS.items()
    ],
)
def test_all_steps_are_one_graph_whatever_the_learning_rate(changes: dict[str, Any]) -> None:
    training, eager = Training(**changes), Training(**changes)
    counter = compiled(training, fullgraph=True)
    rel = 0.02 if "precision" in changes else 1e-4
    for number in range(30):
        assert training.step(number) == pytest.approx(eager.step(number), rel=rel)
    assert counter.frame_count == 1
    assert training.validate() == pytest.approx(eager.validate(), rel=rel)
    assert counter.frame_count == 2
    training.step(30)
    training.validate()
    assert counter.frame_count == 2


@pytest.mark.parametrize("layers", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_monitored_steps_take_graphs_of_their_own_once(layers: int) -> None:
    """They are split where each layer is measured; the layers share the parts."""
    training, eager = Training(layers), Training(layers)
    counter = compiled(training)
    counts = []
    for number in range(30):
        is_monitored = number % 10 == 0
        found, expected = (each.step(number, is_monitored) for each in (training, eager))
        assert found == pytest.approx(expected, rel=1e-4)
        counts.append(counter.frame_count)
    assert counts[1] == counts[0] + 1  # the one of the other steps
    assert counts[-1] == counts[1] <= 8


def test_a_smaller_last_micro_batch_takes_one_more_graph() -> None:
    training = Training(micro_batch_size=3)
    counter = compiled(training, fullgraph=True)
    for number in range(5):
        training.step(number)
    assert counter.frame_count == 2
