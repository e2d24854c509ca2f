"""What a global head is worth, judged on models that copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from longshort.studies.framework.comparison import (
    Arms,
    difference,
    difference_text,
    judge_above,
    mean_text,
)
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured
from longshort.studies.language.arms import LS, MHSA
from longshort.studies.language.equal_progress import BEGUN, ONE_SEED, Result, step_at
from longshort.studies.progress.arms import NO_GLOBAL
from longshort.studies.progress.needle import Needles, farthest_gain

COPYING_DROP = 0.5
"""A model copies once its loss on the second half of repeated random tokens has fallen this far below its
highest value since its validation loss fell to `BEGUN`, in nats per token. That loss first rises, to 4.7 of
MHSA and LS alike, as the model learns text, which random bytes are not; it varies by 0.2 from one evaluation
to the next."""

TOLERANCE = 0.02
"""Losses nearer than this, in nats per byte, are called alike."""


ENOUGH = Claim(
    "design: one global head",
    "One global head per layer is enough: with all heads global the loss is no lower.",
    f"With all heads global the loss is lower by more than {TOLERANCE} nats per byte.",
    "The 95 % interval of the validation loss at the end of the constant rate, all heads global minus one, "
    f"paired over seeds. Shown: lower end above −{TOLERANCE}. Contradicted: upper end below −{TOLERANCE}. "
    f"Open unless both copy on every seed: a loss on repeated random tokens {COPYING_DROP} nats per token "
    "below its highest value before, once it has begun to learn. Otherwise not shown. Whatever is said must "
    "also pass Holm's correction over the study's claims, p < 0.05.",
    paper="a few global heads, often one",
)
NEEDED = Claim(
    "design: a global head",
    "A global head is needed: with local heads alone the loss is higher.",
    "Without global heads the loss is as low.",
    "The 95 % interval of the validation loss at the end of the constant rate, no global head minus one, "
    "paired over seeds. Shown: lower end above 0. Contradicted: upper end below 0. Otherwise not shown. Open "
    f"unless LS copies on every seed: a loss on repeated random tokens {COPYING_DROP} nats per token below "
    f"its highest value before, once it has begun to learn, and both have a validation loss of {BEGUN} nats "
    "per byte or less before the rate decays. Whatever is said must also pass Holm's correction over the "
    "study's claims, p < 0.05.",
    paper="one for the long range",
)


def judge_enough(arms: Arms, needles: Needles) -> Verdict:
    """Judge `ENOUGH` by MHSA and LS, with the needles that are measured beside them."""
    pair = (MHSA.name, LS.name)
    return _judge_design(ENOUGH, arms, needles, pair, pair, -TOLERANCE)


def judge_needed(arms: Arms, needles: Needles) -> Verdict:
    """Judge `NEEDED` by LS with and without global heads, with the needles that are measured beside them."""
    return _judge_design(NEEDED, arms, needles, (NO_GLOBAL.name, LS.name), (LS.name,), 0.0)


def _judge_design(
    claim: Claim,
    arms: Arms,
    needles: Needles,
    pair: tuple[str, str],
    copying: Sequence[str],
    bound: float,
) -> Verdict:
    """Judge the difference of the losses of two arms against a bound; open unless both have begun to learn
    and the `copying` ones copy."""
    if any(name not in arms for name in pair):
        return not_measured(claim)
    if any(len(arms[name].results()) < 2 for name in pair):
        return not_measured(claim, ONE_SEED)
    first, second = (arms[name] for name in pair)
    change = difference(first, second, "constant_loss")
    scores = {name: mean_text(_copying_loss(result) for result in arms[name].results()) for name in pair}
    evidence = (
        f"{pair[0]} − {pair[1]}: {difference_text(change)} nats per byte at the end of the constant rate, "
        f"{difference_text(difference(first, second, 'validation_loss'))} after the decay. Loss on repeated "
        f"random bytes: {', '.join(f'{name} {score}' for name, score in scores.items())}."
    )
    if all(name in needles for name in pair):
        gains = (f"{name} {mean_text(map(farthest_gain, needles[name]))}" for name in pair)
        evidence += (
            " Gain of a needle at the largest distance, nats per byte, on the last "
            f"{len(needles[pair[0]])} seeds: {', '.join(gains)}."
        )
    for names, step_of, words in (
        (pair, partial(step_at, loss=BEGUN), f"fall to {BEGUN} nats per byte"),
        (copying, copying_step, "copy"),
    ):
        late = [name for name in names if None in map(step_of, arms[name].results())]
        if late:
            text = f"{', '.join(late)} did not {words} on every seed. {evidence}"
            return Verdict(claim, Outcome.NOT_REACHED, text)
    here = f"{difference_text(change)} nats per byte"
    return Verdict(claim, judge_above(change, bound), evidence, change.p_value(bound), here)


def copying_step(result: Result) -> int | None:
    """Return the first step at which a run copies, at the constant rate; None if it never does."""
    highest = -math.inf
    begun = step_at(result, BEGUN)
    for step, loss in result["copying_curve"]:
        if begun is None or step > result["constant_until"]:
            break
        if loss is not None and step >= begun:
            highest = max(highest, loss)
            if loss <= highest - COPYING_DROP:
                return step
    return None


def _copying_loss(result: Result) -> float | None:
    """The loss of copying at the end of the constant rate."""
    return [loss for step, loss in result["copying_curve"] if step <= result["constant_until"]][-1]
