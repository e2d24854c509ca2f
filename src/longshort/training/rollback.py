"""What a run does about a spike.

A rollback is what PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1): go back to a checkpoint of
about 100 steps before the spike and leave out a few hundred batches, those that led to it among them.

Only a checkpoint at least `rollback_steps` older than the spike's first sign counts as good: one taken
shortly before may hold what led to it. The weights before the first step are a checkpoint too, always good.
Checkpoints that an interrupt left between the regular ones do not count, so that a run that was interrupted
goes back as far as one that was not.
"""

from __future__ import annotations

from typing import Any

from longshort.stability import Spike
from longshort.training.checkpoints import TrainState, checkpoint_steps
from longshort.training.config import TrainConfig


def good_checkpoint(settings: TrainConfig, onset: int) -> int | None:
    """Step of the latest regular checkpoint at least `rollback_steps` before a spike that began at step
    `onset`; else of the first that is older than it; None: there is none."""
    older = [
        step
        for step in checkpoint_steps(settings.out)
        if step < onset and step % settings.checkpoint_every == 0
    ]
    good = [step for step in older if step <= onset - settings.rollback_steps]
    return good[-1] if good else min(older, default=None)


def respond(spike: Spike, settings: TrainConfig, state: TrainState) -> dict[str, Any]:
    """Decide what to do about a spike: its entry in metrics.jsonl, see `longshort.training.metrics`.

    Args:
        spike: seen in the step that was just done.
        settings: of the run; `on_spike` is not None.
        state: after that step.
    """
    entry: dict[str, Any] = {
        "reasons": list(spike.reasons),
        "onset": spike.onset,
        "action": settings.on_spike,
    }
    if settings.on_spike != "rollback":
        return entry
    to_step = good_checkpoint(settings, spike.onset)
    if to_step is None or state.attempt >= settings.max_rollbacks:
        return entry | {"action": "stop"}
    skipped = max(settings.skip_batches, state.step - to_step)
    return entry | {"to_step": to_step, "batches_skipped": state.batches_skipped + skipped}


def describe(entry: dict[str, Any], settings: TrainConfig, state: TrainState) -> str:
    """What a reader should know of a spike and of what is done about it.

    Args:
        entry: by `respond`, which got the same settings and state.
    """
    text = f"spike at step {state.step}: {', '.join(entry['reasons'])}; "
    if entry["action"] == "report":
        return text + "the run goes on"
    if entry["action"] == "rollback":
        skipped = entry["batches_skipped"] - state.batches_skipped
        return text + (
            f"back to step {entry['to_step']}, {skipped} batches are left out "
            f"(rollback {state.attempt + 1} of at most {settings.max_rollbacks})"
        )
    tried = f" (rollbacks so far: {state.attempt})" if settings.on_spike == "rollback" else ""
    return f"{text}stopping{tried}; a checkpoint is written first"
