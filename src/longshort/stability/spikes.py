"""Detection of spikes during a training run, and of divergence afterwards."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from longshort.checks import require_integer, require_positive
from longshort.stability.alarms import Alarm, ByHead, alarm_score

ALARM_BOUNDS: dict[Alarm, float] = {"row-range": 0.1, "entropy": 0.9, "update": 0.9}
"""The score above which each alarm is a sign: a row range that doubles in 7 steps, 90 % of an entropy gone.
Provisional: no study has set them. Two runs of the preset tiny that did not diverge reached 0.05, 0.81 and
0.77, one of them at a far too high rate."""

_ALARM_TEXTS: dict[Alarm, str] = {
    "row-range": "slope of the log row range of a head {:.3g} a step",
    "entropy": "fall of the entropy of a head {:.3g}",
    "update": "fall of the spectral entropy of a head's update {:.3g}",
}

_GAUSSIAN = 1.4826  # the standard deviation of a normal distribution in units of its MAD


@dataclass(frozen=True)
class Spike:
    """A spike that `SpikeDetector` found.

    Attributes:
        step: step at which it was found.
        onset: step at which it began; before `step` if it was recognised by its duration.
        reasons: a sentence per sign.
    """

    step: int
    onset: int
    reasons: tuple[str, ...]


@dataclass
class SpikeDetector:
    """Detects spikes of a training run from loss, gradient norm and largest attention logit of each step.

    The signs, each reported once, and again only after `calm_steps` steps without it:

    - a number that is not finite;
    - a loss above the median of the last `window` by `loss_margin` nats and by `loss_score` robust standard
      deviations (1.4826·MAD, the median absolute deviation, which a spike itself hardly moves);
    - a gradient norm above its median by `norm_score` of them, and `norm_ratio` times as large: norms have
      heavy tails, and clipping makes most of them harmless;
    - a running loss (mean of the last `rise_window`) that has been `rise` nats above its minimum so far for
      `rise_steps` steps in a row: a slow rise, which the medians follow;
    - a largest logit above `logit_bound`; or above `logit_floor` and `logit_ratio` times the median of its
      last `window` measurements;
    - with an `alarm`, a score of it above `alarm_bound`.

    Medians wait for half a window of values. Nothing here is random: the same numbers give the same spikes.

    Attributes:
        window: steps that a median looks back; long against a spike, short against the descent of the loss.
        loss_score: batches differ by up to 4 or 5 standard deviations in a long run.
        loss_margin: nats; a late loss varies so little that 8 deviations alone would mean nothing.
        norm_score: see above.
        norm_ratio: odd batches of small runs that were well had norms up to 11 times the median.
        rise_window, rise, rise_steps: 0.5 nats, as in `divergence_step`, but reported earlier.
        logit_bound: beyond it bf16 numbers, 8 bits of mantissa, are 4 nats apart.
        logit_floor: Kimi K2's threshold; smaller logits grow by large ratios early in any healthy run.
        logit_ratio: see above.
        calm_steps: keeps one spike from being reported twice.
        alarm: what else is watched, as in `longshort.stability.alarms`; None: nothing.
        alarm_bound: None: that of `ALARM_BOUNDS`.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    window: int = 100
    loss_score: float = 8.0
    loss_margin: float = 0.3
    norm_score: float = 10.0
    norm_ratio: float = 20.0
    rise_window: int = 10
    rise: float = 0.5
    rise_steps: int = 20
    logit_bound: float = 1000.0
    logit_floor: float = 100.0
    logit_ratio: float = 4.0
    calm_steps: int = 50
    alarm: Alarm | None = None
    alarm_bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "rise_window", "rise_steps", "calm_steps"):
            require_integer(name, getattr(self, name), minimum=1)
        for name in (
            "loss_score", "loss_margin", "norm_score", "norm_ratio", "rise", "logit_bound", "logit_floor",
            "logit_ratio",
        ):  # fmt: skip
            require_positive(name, getattr(self, name))
        self._score = None if self.alarm is None else alarm_score(self.alarm)
        if self.alarm_bound is not None:
            require_positive("alarm_bound", self.alarm_bound)
        self._losses: deque[float] = deque(maxlen=self.window)
        self._norms: deque[float] = deque(maxlen=self.window)
        self._logits: deque[float] = deque(maxlen=self.window)
        self._rise = _Rise(self.rise_window, self.rise)
        self._last_steps: dict[str, int] = {}  # of each sign

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        max_logit: float | None = None,
        by_head: ByHead | None = None,
    ) -> Spike | None:
        """Record one step.

        Args:
            step: number of the step; steps come in order.
            loss: nats per token.
            grad_norm: before clipping.
            max_logit: None on steps that do not measure it.
            by_head: what the alarm needs, see `ALARM_MEASUREMENTS`; None on steps that do not measure it.

        Returns:
            The spike, on the step that first shows a sign of it; else None.
        """
        numbers = [("loss", loss), ("gradient norm", grad_norm), ("largest logit", max_logit)]
        bad = [name for name, value in numbers if value is not None and not math.isfinite(value)]
        signs = {"finite": f"{' and '.join(bad)} not finite" if bad else None}
        onset = step
        if math.isfinite(loss):
            signs["loss"] = self._loss_sign(loss)
            self._losses.append(loss)
            raised = self._rise.add(loss)
            signs["rise"] = None
            if raised >= self.rise_steps:
                signs["rise"] = f"running loss {self.rise:g} nats above its minimum for {raised} steps"
        if math.isfinite(grad_norm):
            signs["norm"] = self._norm_sign(grad_norm)
            self._norms.append(grad_norm)
        if max_logit is not None and math.isfinite(max_logit):
            signs["logit"] = self._logit_sign(max_logit)
            self._logits.append(max_logit)
        if by_head is not None:
            signs["alarm"] = self._alarm_sign(step, by_head)
        new = {name: text for name, text in signs.items() if text is not None and self._is_new(name, step)}
        self._last_steps |= {name: step for name, text in signs.items() if text is not None}
        if not new:
            return None
        if "rise" in new:
            onset = step - self.rise_steps + 1
        return Spike(step, onset, tuple(new.values()))

    def state(self) -> dict[str, Any]:
        """Return what was recorded, for JSON; `restore` puts it into a detector with the same fields."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "logits": list(self._logits),
            "rise": self._rise.state(),
            "last_steps": dict(self._last_steps),
            "alarm": None if self._score is None else self._score.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replace what was recorded by `state`."""
        for values, name in ((self._losses, "losses"), (self._norms, "norms"), (self._logits, "logits")):
            values.clear()
            values.extend(state[name])
        self._rise = _Rise(self.rise_window, self.rise, **state["rise"])
        self._last_steps = dict(state["last_steps"])
        if self._score is not None:
            self._score.restore(state["alarm"])

    def _is_new(self, sign: str, step: int) -> bool:
        last = self._last_steps.get(sign)
        return last is None or step - last > self.calm_steps

    def _loss_sign(self, loss: float) -> str | None:
        if 2 * len(self._losses) < self.window:
            return None
        middle, deviation = _middle_and_deviation(self._losses)
        if loss - middle <= max(self.loss_margin, self.loss_score * deviation):
            return None
        return f"loss {loss:.3f} above its median {middle:.3f}"

    def _norm_sign(self, norm: float) -> str | None:
        if 2 * len(self._norms) < self.window:
            return None
        middle, deviation = _middle_and_deviation(self._norms)
        if norm <= max(self.norm_ratio * middle, middle + self.norm_score * deviation):
            return None
        return f"gradient norm {norm:.3g} above its median {middle:.3g}"

    def _logit_sign(self, logit: float) -> str | None:
        if logit > self.logit_bound:
            return f"largest logit {logit:.0f} above {self.logit_bound:g}"
        if 2 * len(self._logits) < self.window:
            return None
        middle = median(self._logits)
        if logit <= max(self.logit_floor, self.logit_ratio * middle):
            return None
        return f"largest logit {logit:.0f} above its median {middle:.0f}"

    def _alarm_sign(self, step: int, by_head: ByHead) -> str | None:
        if self.alarm is None or self._score is None:
            return None
        score = self._score.add(step, by_head)
        bound = ALARM_BOUNDS[self.alarm] if self.alarm_bound is None else self.alarm_bound
        if score is None or score <= bound:
            return None
        return f"{_ALARM_TEXTS[self.alarm].format(score)} above {bound:g}"


def divergence_step(losses: Iterable[float | None], margin: float = 0.5) -> int | None:
    """Return the step, counted from 1, at which a run had diverged, or None if it has not.

    A run has diverged when a loss is not finite, or when its running loss (mean of the last 50 steps) has
    been `margin` above its minimum so far for 100 steps in a row. This is the definition of our studies.

    Args:
        losses: nats per token, one per step; None means one that is not finite, as in metrics.jsonl.
        margin: nats per token; 0.5 nats a piece of text are about 0.14 a byte.
    """
    found = _divergence(losses, margin)
    return None if found is None else found[1]


def divergence_onset(losses: Iterable[float | None], margin: float = 0.5) -> int | None:
    """Return the step at which the loss of a run that has diverged began to show it, or None.

    That is the first of the steps in a row, up to `divergence_step`, at which its running loss was `margin`
    above the minimum, or whose loss is not finite.
    """
    found = _divergence(losses, margin)
    return None if found is None else found[0]


def _divergence(losses: Iterable[float | None], margin: float) -> tuple[int, int] | None:
    """Return the steps at which a divergence began to show, and at which it was one."""
    rise, raised = _Rise(window=50, margin=margin), 0
    for step, loss in enumerate(losses, start=1):
        if loss is None or not math.isfinite(loss):
            return step - raised, step
        raised = rise.add(loss)
        if raised >= 100:
            return step - raised + 1, step
    return None


class _Rise:
    """A count of the steps in a row in which the running loss was `margin` above its minimum so far."""

    def __init__(
        self,
        window: int,
        margin: float,
        losses: Iterable[float] = (),
        lowest: float | None = None,
        steps: int = 0,
    ):
        self._margin = margin
        self._losses = deque(losses, maxlen=window)
        self._lowest = lowest
        self._steps = steps

    def add(self, loss: float) -> int:
        self._losses.append(loss)
        if len(self._losses) < (self._losses.maxlen or 0):
            return 0
        running = math.fsum(self._losses) / len(self._losses)
        self._lowest = running if self._lowest is None else min(running, self._lowest)
        self._steps = self._steps + 1 if running >= self._lowest + self._margin else 0
        return self._steps

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "lowest": self._lowest, "steps": self._steps}


def _middle_and_deviation(values: deque[float]) -> tuple[float, float]:
    """Return the median and the robust standard deviation."""
    middle = median(values)
    return middle, _GAUSSIAN * median(abs(value - middle) for value in values)
