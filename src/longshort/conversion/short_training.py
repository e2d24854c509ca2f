"""A short training of a pretrained decoder on windows of text, which can be interrupted and resumed.

The weights or LoRA's factors are trained by AdamW without decay, on the cross-entropy, or on its mix with the
divergence from a teacher, KL(teacher ‖ student), mean over tokens. The learning rate rises over the first
steps and then falls on a line to a tenth. A budget of time is turned into a number of steps as soon as the
first steps show how long one takes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from longshort.conversion.losses import mean_loss
from longshort.data.files import sync_tree
from longshort.training.interrupts import Interrupts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from longshort.data import Batch, Batches

STATE_FILE = "state.safetensors"
_TIMED_STEPS = 4  # the first of them also warms up
_SAVE_EVERY = 300.0  # seconds
_WARM_UP, _LOWEST = 0.05, 0.1  # shares of the steps and of the learning rate
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Attributes:
        steps: optimizer steps; None: as many as fit into `seconds`.
        seconds: budget of time, measurements included; None: no limit.
        learning_rate: the largest, after the warm-up.
        distill_weight: 0 … 1, share of the divergence from the teacher in the loss.
        measurements: how often the loss on held-out windows is measured, after the first time.
        seed: the seed of what is random in a step, such as dropout: the same in a step whenever it is made.
        rates: learning rates of the first steps, instead of those of the schedule; None: the schedule's.
    """

    steps: int | None
    seconds: float | None
    learning_rate: float
    distill_weight: float = 0.0
    measurements: int = 8
    seed: int = 0
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Progressed:
    """The progress of a training.

    Attributes:
        step: optimizer steps done.
        planned: steps in all; None while it is not known.
        seconds: time that they and the measurements took.
        lines: metrics by step: `step`, `loss`, `learning_rate`, `seconds`, and `held_out_loss` where it was
            measured.
        is_done: whether the budget is used up or the goal reached.
    """

    step: int = 0
    planned: int | None = None
    seconds: float = 0.0
    lines: list[dict[str, float]] = field(default_factory=list)
    is_done: bool = False

    @property
    def last_held_out(self) -> float:
        """The held-out loss measured last."""
        return next(line["held_out_loss"] for line in reversed(self.lines) if "held_out_loss" in line)


Report = Callable[[Progressed], None]


class ShortTraining:
    """One training, in a folder with its state.

    Args:
        model: the decoder; its parameters that require gradients are trained, in place.
        batches: the batches of the training text.
        held_out: token ids, (count, length), that the loss is measured on.
        recipe: how to train.
        folder: for the state.
        teacher: a model whose logits are imitated; None: no distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        held_out: Tensor,
        recipe: Recipe,
        folder: Path,
        teacher: nn.Module | None = None,
    ) -> None:
        self._model, self._batches, self._held_out = model, batches, held_out
        self._recipe, self._file, self._teacher = recipe, folder / STATE_FILE, teacher
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.progressed = self._load() if self._file.exists() else Progressed(planned=recipe.steps)

    def run(self, report: Report, goal: float | None = None, steps: int | None = None) -> Progressed:
        """Train until the budget is used, the held-out loss is at most `goal`, or Ctrl-C; the state is saved.

        Args:
            report: called after each step.
            goal: nats per token; None: none.
            steps: end after this step, even if the budget, and so the schedule, is longer.

        Returns:
            The progress; not done if it was interrupted.

        Raises:
            ValueError: the loss is not finite.
            OSError: the state could not be saved.
        """
        now = self.progressed
        if now.is_done:
            return now
        with Interrupts(is_patient=False) as interrupts:
            before = now.seconds
            started = saved = time.perf_counter()

            def seconds() -> float:
                return before + time.perf_counter() - started

            if not now.lines:
                line = {"step": 0.0, "seconds": seconds(), "held_out_loss": self.measure()}
                now = replace(now, seconds=seconds(), lines=[line])
            while not now.is_done and interrupts.signal is None:
                now = self._step(now, seconds, goal, steps)
                report(now)
                if now.is_done or interrupts.signal is not None or time.perf_counter() - saved > _SAVE_EVERY:
                    self._save(now)
                    saved = time.perf_counter()
        self.progressed = now
        return now

    def measure(self) -> float:
        """Measure the loss on the held-out windows, nats per token."""
        self._model.eval()
        loss = mean_loss(self._model, self._held_out)
        self._model.train()
        return loss

    def _step(
        self, now: Progressed, seconds: Callable[[], float], goal: float | None, last_step: int | None
    ) -> Progressed:
        step, planned = now.step + 1, now.planned
        rate = self._rate(now.step, planned)
        loss = self._train(now.step, rate)
        line = {"step": float(step), "loss": loss, "learning_rate": rate}
        if planned is None and step >= _TIMED_STEPS:
            planned = self._plan(now, seconds())
        budget = self._recipe.seconds
        ends = (planned is not None and step >= planned) or step == last_step
        ends = ends or (budget is not None and seconds() >= budget)
        is_due = planned is not None and step % max(1, planned // self._recipe.measurements) == 0
        if is_due or ends:
            line["held_out_loss"] = self.measure()
            ends = ends or (goal is not None and line["held_out_loss"] <= goal)
        line["seconds"] = seconds()
        return Progressed(step, planned, line["seconds"], [*now.lines, line], ends)

    def _train(self, index: int, rate: float) -> float:
        """Take one optimizer step; return the mean loss of its batch."""
        self._model.train()
        batch = self._batches.batch(index)
        total = 0.0
        device = next(iter(self._trained.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(((self._recipe.seed << 32) + index) % 2**63)
            for row in range(len(batch.input_ids)):
                loss = self._loss(batch, row) / len(batch.input_ids)
                loss.backward()
                total += loss.item()
        if not math.isfinite(total):
            raise ValueError(f"the loss of step {index + 1} is {total}: try a smaller learning_rate")
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, batch: Batch, row: int) -> Tensor:
        device = next(iter(self._trained.values())).device
        ids, labels = batch.input_ids[row : row + 1].to(device), batch.labels[row].to(device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits, labels)
        weight = self._recipe.distill_weight
        if self._teacher is None or not weight:
            return loss
        with torch.no_grad():
            wanted = self._teacher(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * loss + weight * divergence

    def _rate(self, done: int, planned: int | None) -> float:
        if self._recipe.rates is not None and done < len(self._recipe.rates):
            return self._recipe.rates[done]
        if planned is None:  # as if the warm-up were not over
            return self._recipe.learning_rate * (done + 1) / (2 * _TIMED_STEPS)
        warm_up = max(1, round(_WARM_UP * planned))
        if done < warm_up:
            return self._recipe.learning_rate * (done + 1) / (warm_up + 1)
        left = (planned - done) / max(1, planned - warm_up)
        return self._recipe.learning_rate * (_LOWEST + (1 - _LOWEST) * left)

    def _plan(self, now: Progressed, seconds: float) -> int:
        """Return the number of steps that fit into the budget of time, with the measurements between them."""
        assert self._recipe.seconds is not None
        first = now.lines[1]["seconds"]  # after the step that warms up
        per_step = (seconds - first) / (now.step)
        per_measurement = now.lines[0]["seconds"]
        left = self._recipe.seconds - seconds - (self._recipe.measurements + 1) * per_measurement
        return now.step + 1 + max(0, math.floor(0.97 * left / per_step))

    def _save(self, now: Progressed) -> None:
        tensors = {name: parameter.detach().contiguous() for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            held = self._optimizer.state.get(parameter, {})
            tensors |= {
                f"{name}.{moment}": held[moment].contiguous() for moment in _MOMENTS if moment in held
            }
        partial = self._file.with_name(f".{self._file.name}.partial")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"state": json.dumps(asdict(now))})
        sync_tree(self._file.parent)
        partial.replace(self._file)

    def _load(self) -> Progressed:
        device = str(next(iter(self._trained.values())).device)
        with safe_open(self._file, framework="pt", device=device) as file:
            names = set(file.keys())
            missing = self._trained.keys() - names
            if missing:
                raise ValueError(f"{self._file} is of another training: it lacks {min(missing)}")
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(file.get_tensor(name))
                    if f"{name}.step" in names:
                        self._optimizer.state[parameter] = {
                            moment: file.get_tensor(f"{name}.{moment}").clone() for moment in _MOMENTS
                        }
            return Progressed(**json.loads(file.metadata()["state"]))
