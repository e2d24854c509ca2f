"""Rollbacks and other responses of a run to a spike.

A rollback is what PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1): go back to a checkpoint of
about 100 steps before the spike and leave out a few hundred batches, including those that led to it.

Only a checkpoint at least `rollback_steps` older than the spike's first sign counts as good: a later one may
contain the cause. The weights before the first step are a checkpoint too, always good. Checkpoints that an
interrupt left between the regular ones count neither here nor among those that are kept, so that an
interrupted run goes back as far as one without interrupts.
"""

from __future__ import annotations

from typing import Any

from longshort.stability import Spike
from longshort.training.checkpoints import TrainState, checkpoint_steps
from longshort.training.config import TrainConfig


def good_checkpoint(settings: TrainConfig, onset: int) -> int | None:
    """Return the step of the latest regular checkpoint at least `rollback_steps` before a spike that began at
    step `onset`, else of the first one before it; None if there is none."""
    older = [step for step in _regular(settings, checkpoint_steps(settings.out)) if step < onset]
    good = [step for step in older if step <= onset - settings.rollback_steps]
    return good[-1] if good else min(older, default=None)


def checkpoints_to_keep(settings: TrainConfig, onset: int) -> list[int]:
    """Return the steps of the checkpoints to keep once the latest one is written.

    They are the latest `keep_checkpoints`, and those that a rollback may need. With rollbacks only regular
    checkpoints count; one that an interrupt left is removed after the next regular one.

    Args:
        onset: the first step at which a spike that is not detected yet may have begun.
    """
    steps, count = checkpoint_steps(settings.out), settings.keep_checkpoints
    if count is None or settings.on_spike != "rollback":
        return steps if count is None else steps[-count:]
    regular = _regular(settings, steps)
    if steps[-1] not in regular:
        return steps
    needed_from = good_checkpoint(settings, onset)
    if needed_from is None:  # the first spikes go back to the first
        return regular
    return [step for step in regular if step >= needed_from or step in regular[-count:]]


def respond(spike: Spike, settings: TrainConfig, state: TrainState) -> dict[str, Any]:
    """Decide what to do about a spike; return its entry in metrics.jsonl, see `longshort.training.metrics`.

    Args:
        spike: the spike that the last step showed.
        settings: settings of the run; `on_spike` is not None.
        state: the state after that step.
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
    """Describe a spike and the response to it, for the user.

    Args:
        entry: the result of `respond` for the same settings and state.
    """
    text = f"spike at step {state.step}: {', '.join(entry['reasons'])}; "
    if entry["action"] == "report":
        return text + "the run continues"
    if entry["action"] == "rollback":
        skipped = entry["batches_skipped"] - state.batches_skipped
        return text + (
            f"back to step {entry['to_step']}, {skipped} batches are left out "
            f"(rollback {state.attempt + 1} of at most {settings.max_rollbacks})"
        )
    cause = ""
    if settings.on_spike == "rollback" and state.attempt < settings.max_rollbacks:
        cause = f", no checkpoint from before step {entry['onset']} to go back to"
    elif settings.on_spike == "rollback":
        cause = f", --max-rollbacks {settings.max_rollbacks} is reached"
    return f"{text}stopping{cause}; a checkpoint is written first"


def _regular(settings: TrainConfig, steps: list[int]) -> list[int]:
    return [step for step in steps if step % settings.checkpoint_every == 0]
