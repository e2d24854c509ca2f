"""The claims of the study `explosion`, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longshort.reporting.intervals import Interval, confidence_interval
from longshort.studies.comparison import (
    RATES,
    Rate,
    Trained,
    difference_text,
    edge_text,
    in_band_log_ratio,
    interval_text,
    judge_below,
    log_ratio,
    loss_difference,
    loss_difference_at_equal_flops,
)
from longshort.studies.settings import LS, MHSA, MHSA_ROPE, with_model, with_train
from longshort.studies.study import Claim, Outcome, Verdict, weaker

ALIBI = with_model(MHSA, "MHSA + ALiBi", position_embedding="alibi")
CONVOLUTION = with_model(MHSA, "MHSA + convolution", short_convolution=4)
PERMUTED = with_train(MHSA, "MHSA, permuted text", token_order="permuted")
EXPLANATIONS = (MHSA_ROPE, ALIBI, CONVOLUTION)

FLAT = 1.1
"""Logits that grow by less over the second half of the training are called flat."""

DIVERGENCE = Claim(
    "F1, F4: divergence",
    "With MHSA the training loss begins to diverge after some steps; the same model with LS-attention is "
    "stable.",
    "LS diverges where MHSA does not, or no setting is found where MHSA alone diverges.",
    "Shown: at some setting MHSA diverges in at least 2 of 3 seeds (two thirds of them) and LS in none. "
    "Contradicted: the same with the names exchanged, at some setting, and never as claimed. Otherwise not "
    "shown. Diverged is a loss that is not finite, or a running loss (mean of 50 steps) 0.5 nats above its "
    "minimum for 100 steps. Settings: every learning rate that both arms ran on all seeds, the stress rate "
    "among them, and the map's.",
)
RATIO = Claim(
    "F1: ratio of logits",
    "LS-attention keeps the largest logit below 1/20 of MHSA's.",
    "LS's largest logit is as large as MHSA's, or larger.",
    "The 95 % interval of LS/MHSA, paired over seeds, largest logits of the last tenth of the training, each "
    "arm at its own rate. Shown: upper end below 1/20. Partly: below 1. Contradicted: lower end above 1. It "
    "must hold at the best rates and at the next lower ones.",
)
MECHANISM = Claim(
    "mechanism",
    "MHSA's logits grow because text depends densely on nearby tokens, which full attention cannot draw.",
    "MHSA's logits grow alike on permuted text, where no dependency is local; or a tuned MHSA + RoPE stays "
    "flat, for it is full attention of the same rank.",
    "95 % intervals of the ratio of largest logits to those of MHSA with learned positions, paired over "
    "seeds. Shown: below 1 on permuted text, and with RoPE, ALiBi and convolution. Partly: below 1 on "
    "permuted text and with at least one of the three. Not shown: otherwise, or if MHSA + RoPE is flat (its "
    f"largest logit at the end at most {FLAT} times that at half of the training, in the mean). "
    "Contradicted: above 1 on permuted text and with all three. It must hold at the best rates and at the "
    "next lower ones.",
)


Divergences = Mapping[str, Mapping[str, Sequence[int | None]]]
"""For each setting and arm the step of each seed at which it diverged."""


def judge_divergence(diverged: Divergences) -> Verdict:
    """By the rule of `DIVERGENCE`."""

    def alone(first: str, second: str) -> list[str]:
        return [
            setting
            for setting, rows in diverged.items()
            if _count(rows[first]) >= max(2, 2 * len(rows[first]) / 3) and _count(rows[second]) == 0
        ]

    as_claimed, reverse = alone(MHSA.name, LS.name), alone(LS.name, MHSA.name)
    counts = {arm.name: sum(_count(rows[arm.name]) for rows in diverged.values()) for arm in (MHSA, LS)}
    runs = sum(len(rows[MHSA.name]) for rows in diverged.values())
    evidence = (
        f"{counts[MHSA.name]} of {runs} runs of MHSA and {counts[LS.name]} of {runs} of LS diverged, over "
        f"{len(diverged)} settings."
    )
    if all(len(rows[MHSA.name]) < 2 for rows in diverged.values()):
        return Verdict(DIVERGENCE, Outcome.NOT_MEASURED, "No setting was run on at least two seeds.")
    if as_claimed:
        return Verdict(DIVERGENCE, Outcome.SHOWN, f"{evidence} MHSA alone: {'; '.join(as_claimed)}.")
    if reverse:
        return Verdict(DIVERGENCE, Outcome.CONTRADICTED, f"{evidence} LS alone: {'; '.join(reverse)}.")
    return Verdict(DIVERGENCE, Outcome.NOT_SHOWN, evidence)


def _count(steps: Sequence[int | None]) -> int:
    return sum(step is not None for step in steps)


def judge_ratio(arms: Mapping[str, Trained]) -> Verdict:
    """By the rule of `RATIO`."""
    if MHSA.name not in arms or LS.name not in arms:
        return Verdict(RATIO, Outcome.NOT_MEASURED, "The trials are not done.")
    ls, mhsa = arms[LS.name], arms[MHSA.name]
    ratios = {rate: log_ratio(ls, mhsa, "max_logit", rate).exp() for rate in RATES}
    outcome = weaker(*(judge_below(ratio, 1 / 20, 1.0) for ratio in ratios.values()))
    in_band = in_band_log_ratio(ls, mhsa).exp()
    row_range = log_ratio(ls, mhsa, "row_range").exp()
    losses = loss_difference(ls, mhsa), loss_difference_at_equal_flops(ls, mhsa)
    return Verdict(
        RATIO,
        outcome,
        f"LS/MHSA is {interval_text(ratios['best'])} at the best rates and {interval_text(ratios['lower'])} "
        f"at the next lower ones. Inside the window, over equal sets of pairs: {interval_text(in_band)}; of "
        f"the row ranges: {interval_text(row_range)}. Validation loss, LS − MHSA: "
        f"{difference_text(losses[0])} nats per token at equal steps, {difference_text(losses[1])} at equal "
        f"FLOPs.{edge_text((ls, mhsa))}",
    )


def judge_mechanism(arms: Mapping[str, Trained]) -> Verdict:
    """By the rule of `MECHANISM`."""
    needed = (MHSA, PERMUTED, *EXPLANATIONS)
    if any(arm.name not in arms for arm in needed):
        return Verdict(MECHANISM, Outcome.NOT_MEASURED, "The trials are not done.")
    outcomes, texts = [], []
    for rate in RATES:
        ratios = {
            arm.name: log_ratio(arms[arm.name], arms[MHSA.name], "max_logit", rate).exp()
            for arm in needed[1:]
        }
        growth = _late_growth(arms[MHSA_ROPE.name], rate)
        outcomes.append(mechanism_outcome(ratios, growth.mean))
        numbers = "; ".join(f"{name} {interval_text(ratio)}" for name, ratio in ratios.items())
        texts.append(
            f"At the {'best' if rate == 'best' else 'next lower'} rates, relative to MHSA with learned "
            f"positions: {numbers}. MHSA + RoPE's largest logit grows {growth.mean:.2f} times over the "
            "second half."
        )
    edges = edge_text(arms[arm.name] for arm in needed)
    return Verdict(MECHANISM, weaker(*outcomes), " ".join(texts) + edges)


def mechanism_outcome(ratios: Mapping[str, Interval], rope_growth: float) -> Outcome:
    """By the rule of `MECHANISM`, from the ratios to MHSA by arm, and RoPE's growth over the second half."""
    permuted, *others = (ratios[arm.name] for arm in (PERMUTED, *EXPLANATIONS))
    below = [ratio.high < 1 for ratio in others]
    if permuted.low > 1 and all(ratio.low > 1 for ratio in others):
        return Outcome.CONTRADICTED
    if not permuted.high < 1 or not any(below) or not rope_growth > FLAT:
        return Outcome.NOT_SHOWN
    return Outcome.SHOWN if all(below) else Outcome.PARTLY


def _late_growth(arm: Trained, rate: Rate) -> Interval:
    """Factor between the largest logit at half of the training and at its end, by the curves' last tenths."""
    ratios: list[float | None] = []
    for curve in arm.curves("max_logit", rate):
        last = curve[-1][0]
        end = [value for step, value in curve if step > 0.9 * last]
        middle = [value for step, value in curve if 0.4 * last < step <= 0.5 * last]
        is_known = bool(middle) and None not in end and None not in middle
        ratios.append(max(end) / max(middle) if is_known else None)  # pyright: ignore[reportArgumentType, reportOptionalOperand]
    return confidence_interval(ratios)
