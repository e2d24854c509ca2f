"""Divergence, logits, their growth with the length, and the cost of a loss: MHSA against LS-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Section, Table
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference_text,
    interval_text,
    mean_text,
    rate_text,
)
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured
from longshort.studies.language.arms import LS, MHSA, model_config
from longshort.studies.language.equal_progress import (
    ALIKE,
    BEGUN,
    CORRECTED,
    LEAST_LOSSES,
    LOSSES_TEXT,
    ONE_SEED,
    Result,
    at_each,
    at_two_losses,
    is_stuck,
    judge_at_losses,
    judge_ratio,
    log_cost_ratio_at_loss,
    log_ratio_at_cost,
    log_ratio_at_loss,
    losses_reached,
    p_of_ratio,
    ratios_text,
    sign_test,
    slope_at_loss,
)
from longshort.studies.language.trial import largest
from longshort.studies.progress.chance import chance_slope
from longshort.studies.progress.figures import loss_table

DIVERGENCE = Claim(
    "F1, F4: divergence",
    "With MHSA the training loss begins to diverge after some steps; the same model with LS-attention is "
    "stable.",
    "LS diverges where MHSA does not.",
    "Pairs of runs of MHSA and LS at the same rate and seed, rates from sound to far too high. Diverged is a "
    "loss that is not finite, or a running loss (mean of 50 steps) 0.14 nats per byte above its minimum for "
    "100 steps. A pair counts if each of its runs diverges or falls to a validation loss of "
    f"{BEGUN} nats per byte at the constant rate: a run that does neither has not begun to learn. Shown: "
    "MHSA diverges alone in more pairs than LS, p < 0.05 by the exact two-sided sign test, which takes the "
    "pairs of one seed at several rates as independent, and after Holm's correction over the study's claims. "
    "Contradicted: the same with the names exchanged. Otherwise not shown. Open if no pair counts.",
    paper="diverges in bf16, figure 1",
)
RATIO = Claim(
    "F1: ratio of logits",
    "LS-attention keeps the largest logit below 1/20 of MHSA's.",
    "At equal progress LS's largest logit is as large as MHSA's, or larger.",
    "95 % intervals of LS/MHSA, paired over seeds, of the largest logit of every 16th query of 32 fixed "
    f"validation windows, where the validation loss first falls to {LOSSES_TEXT} nats per byte, at those of "
    "the losses that all runs reach at the constant rate. Shown: upper end below 1/20 at two or more losses. "
    "Partly: below 1 at two or more. Contradicted: above 1, or alike (within a factor of "
    f"{ALIKE}, even if below 1), at two or more and below 1 at no other. A loss that speaks against the "
    f"claim makes it not shown. Open unless all runs reach two of the losses. {CORRECTED}",
    paper="below 0.05",
)
GROWTH = Claim(
    "F3",
    "With MHSA instability and logit explosion appear at longer sequence lengths.",
    "At equal progress MHSA's logits do not grow with the sequence length, or shrink.",
    "The 95 % interval, over seeds, of the slope of log row range over log n of MHSA, where the validation "
    f"loss first falls to each of {LOSSES_TEXT} that the runs of all lengths reach. Shown: at two or more "
    "losses above the slope of independent normal logits, which a larger number of queries and keys alone "
    "gives. Contradicted: below 0 at two or more and above that slope at none. A loss that speaks against "
    f"the claim makes it not shown. Open unless all runs reach two of the losses. {CORRECTED}",
    paper="at n = 8,192, figure 3",
)
MITIGATION = Claim(
    "F4: each length",
    "LS-attention mitigates the explosion of logits at each length.",
    "At most lengths LS's largest logit at equal progress is larger than MHSA's.",
    "95 % intervals of LS/MHSA, paired over seeds, of the largest logit at each length, where the validation "
    f"loss first falls to each of {LOSSES_TEXT} that the runs of all lengths reach. At a loss: shown if "
    "below 1 at every length, partly if at more than half of them, contradicted if above 1 at more than "
    "half. Shown, or partly: so at two or more losses. Contradicted: at two or more losses, and shown or "
    "partly at no other. A loss that speaks against the claim makes it not shown. Open unless all runs reach "
    f"two of the losses. {CORRECTED}",
    paper="at each of n = 512 to 8,192",
)
SOONER = Claim(
    "progress",
    "LS-attention reaches the same losses with fewer tokens.",
    "LS needs as many tokens as MHSA, or more.",
    "95 % intervals, paired over seeds, of the tokens that LS needs to reach a validation loss, relative to "
    f"MHSA's, at those of {LOSSES_TEXT} nats per byte that all runs reach at the constant rate. Shown: upper "
    f"end below 1 at two or more losses. Contradicted: above 1, or alike (within a factor of {ALIKE}, even "
    "if below 1), at two or more and below 1 at no other. A loss that speaks against the claim makes it not "
    f"shown. Open unless all runs reach two of the losses. {CORRECTED}",
    paper="lower loss, figures 1 and 5",
)


Stressed = Mapping[tuple[str, float], Sequence[Result]]
"""The results of each seed at rates that may be too high, by variant and rate."""


def judge_divergence(stressed: Stressed) -> Verdict:
    """Judge `DIVERGENCE` by the pairs of MHSA and LS at all rates.

    Args:
        stressed: the results of all runs; none until all of them are done.
    """
    rates = sorted({rate for name, rate in stressed if name == MHSA.name and (LS.name, rate) in stressed})
    runs = [
        (rate, *pair)
        for rate in rates
        for pair in zip(stressed[LS.name, rate], stressed[MHSA.name, rate], strict=True)
    ]
    if not runs:
        return not_measured(DIVERGENCE)
    stuck = [rate for rate, *pair in runs if any(map(is_stuck, pair))]
    pairs = [
        (_has_diverged(ours), _has_diverged(theirs))
        for _, ours, theirs in runs
        if not is_stuck(ours) and not is_stuck(theirs)
    ]
    left_out = f"In {len(stuck)} of {len(runs)} pairs a run neither diverged nor began to learn"
    left_out += f": at {', '.join(map(rate_text, dict.fromkeys(stuck)))}." if stuck else "."
    if not pairs:
        return Verdict(DIVERGENCE, Outcome.NOT_REACHED, left_out)
    ls_alone, mhsa_alone = pairs.count((True, False)), pairs.count((False, True))
    p = sign_test(ls_alone, mhsa_alone)
    outcome = Outcome.NOT_SHOWN
    if p < 0.05:
        outcome = Outcome.SHOWN if mhsa_alone > ls_alone else Outcome.CONTRADICTED
    evidence = (
        f"Rates {', '.join(map(rate_text, rates))}. Of {len(pairs)} pairs that count MHSA diverged in "
        f"{sum(theirs for _, theirs in pairs)}, alone in {mhsa_alone}; LS in "
        f"{sum(ours for ours, _ in pairs)}, alone in {ls_alone}; p = {p:.2g}. {left_out}"
    )
    here = f"MHSA alone in {mhsa_alone} of {len(pairs)} pairs, LS alone in {ls_alone}"
    return Verdict(DIVERGENCE, outcome, evidence, p, here)


def _has_diverged(result: Result) -> bool:
    return result["diverged_at"] is not None


def judge_logits(arms: Arms) -> Verdict:
    """Judge `RATIO` by MHSA and LS."""
    pair = (LS.name, MHSA.name)

    def evidence(losses: Sequence[float]) -> str:
        texts = [
            f"of {words} {ratios_text(arms[LS.name], arms[MHSA.name], quantity, losses)}"
            for quantity, words in (
                ("max_logit", "largest logits"),
                ("max_logit_in_band", "those inside the window"),
                ("quantile", "99.9th percentiles"),
                ("row_range", "row ranges"),
            )
        ]
        at_end = [
            f"{interval_text(log_ratio_at_cost(arms[LS.name], arms[MHSA.name], 'max_logit', unit).exp())} at "
            f"equal {words}"
            for unit, words in (("step", "steps"), ("flops", "FLOPs"))
        ]
        return (
            f"LS/MHSA at equal losses: {'; '.join(texts)}. Of largest logits, where the constant rate of one "
            f"ends: {', '.join(at_end)}."
        )

    def log_ratio(loss: float) -> Interval:
        return log_ratio_at_loss(arms[LS.name], arms[MHSA.name], "max_logit", loss)

    return judge_at_losses(
        RATIO, arms, pair,
        at_two_losses(
            lambda loss: judge_ratio(log_ratio(loss).exp(), 1 / 20),
            lambda loss, outcome: p_of_ratio(log_ratio(loss), outcome, 1 / 20),
        ),
        evidence,
        here=lambda loss: interval_text(log_ratio(loss).exp()),
    )  # fmt: skip


def judge_growth(lengths: Mapping[int, Arms]) -> Verdict:
    """Judge `GROWTH` by MHSA at every length."""
    by_length = {n: arms[f"MHSA, n = {n}"] for n, arms in lengths.items() if f"MHSA, n = {n}" in arms}
    if len(by_length) < max(2, len(lengths)):
        return not_measured(GROWTH)
    reached = losses_reached(result for arm in by_length.values() for result in arm.results())
    if len(reached) < 2:
        which = ", ".join(map(str, reached)) or "none"
        here = f"losses that the runs of all lengths reach: {which}"
        texts = [f"{here.capitalize()}; too few for a verdict."]
        texts += [_slopes_text(by_length, reached)] if reached else []
        evidence = " ".join([*texts, *_slopes_of_shorter(by_length), _chance_text(by_length)])
        return Verdict(GROWTH, Outcome.NOT_REACHED, evidence, here=here)
    if all(len(arm.results()) < 2 for arm in by_length.values()):
        return not_measured(GROWTH, ONE_SEED)
    slopes = {loss: slope_at_loss(by_length, "row_range", loss) for loss in reached}
    chance = _chance_slope(by_length)

    def outcome_at(loss: float) -> Outcome:
        if slopes[loss].low > chance:
            return Outcome.SHOWN
        return Outcome.CONTRADICTED if slopes[loss].high < 0 else Outcome.NOT_SHOWN

    def p_at(loss: float, outcome: Outcome) -> float:
        is_against = outcome is Outcome.CONTRADICTED
        return slopes[loss].p_below(0.0) if is_against else slopes[loss].p_above(chance)

    outcome, p, _ = at_two_losses(outcome_at, p_at)(reached)
    evidence = f"{_slopes_text(by_length, reached)} {_chance_text(by_length)}"
    texts = at_each(lambda loss: difference_text(slopes[loss]), reached)
    here = f"slope of the log row range over log n {texts}; by the number of logits alone {chance:+.3f}"
    return Verdict(GROWTH, outcome, evidence, p, here)


def _chance_slope(by_length: Mapping[int, ArmResults]) -> float:
    settings = next(iter(by_length.values())).settings
    config = model_config(settings["model"], settings["train"])
    heads = config.num_hidden_layers * config.num_attention_heads
    return chance_slope(list(by_length), heads * settings["train"]["validation_windows"])


def _slopes_text(by_length: Mapping[int, ArmResults], losses: Sequence[float]) -> str:
    texts = []
    for quantity, words in (
        ("row_range", "row range"), ("max_logit", "largest logit"), ("quantile", "99.9th percentile"),
    ):  # fmt: skip
        slopes = (f"{difference_text(slope_at_loss(by_length, quantity, loss))} at {loss}" for loss in losses)
        texts.append(f"{words}: {', '.join(slopes)}")
    return f"Slope over log n of the logarithm of MHSA's {'; '.join(texts)}."


def _chance_text(by_length: Mapping[int, ArmResults]) -> str:
    return (
        "The row range of independent normal logits, which grows with the number of queries and keys alone, "
        f"has a slope of {_chance_slope(by_length):+.3f}; their percentile has none."
    )


def _slopes_of_shorter(by_length: Mapping[int, ArmResults]) -> list[str]:
    """Report the slopes over the lengths whose runs reach two of the losses, if there are several of them."""
    found = {n: arm for n, arm in by_length.items() if len(losses_reached(arm.results())) >= LEAST_LOSSES}
    reached = losses_reached(result for arm in found.values() for result in arm.results())
    if len(found) < 2 or not reached:
        return []
    lengths = ", ".join(f"{n:,}" for n in found)
    return [f"Without the other lengths, n = {lengths}: {_slopes_text(found, reached)}"]


def judge_mitigation(lengths: Mapping[int, Arms]) -> Verdict:
    """Judge `MITIGATION` by MHSA and LS at every length."""
    pairs = {n: [f"{variant.name}, n = {n}" for variant in (LS, MHSA)] for n in lengths}
    arms = {name: arm for by_name in lengths.values() for name, arm in by_name.items()}

    def log_ratios(loss: float) -> dict[int, Interval]:
        return {
            n: log_ratio_at_loss(arms[ls], arms[mhsa], "max_logit", loss) for n, (ls, mhsa) in pairs.items()
        }

    def outcome_at(loss: float) -> Outcome:
        ratios = log_ratios(loss).values()
        below, above = sum(ratio.high < 0 for ratio in ratios), sum(ratio.low > 0 for ratio in ratios)
        if below == len(pairs):
            return Outcome.SHOWN
        if 2 * above > len(pairs):
            return Outcome.CONTRADICTED
        return Outcome.PARTLY if 2 * below > len(pairs) else Outcome.NOT_SHOWN

    def p_at(loss: float, outcome: Outcome) -> float:
        """Combine the lengths: by Bonferroni's bound on a partial conjunction where most are enough."""
        is_against = outcome is Outcome.CONTRADICTED
        p_values = sorted(
            ratio.p_above(0.0) if is_against else ratio.p_below(0.0) for ratio in log_ratios(loss).values()
        )
        needed = len(pairs) if outcome is Outcome.SHOWN else len(pairs) // 2 + 1
        return min(1.0, (len(pairs) - needed + 1) * p_values[needed - 1])

    def text(loss: float) -> str:
        return ", ".join(f"{interval_text(ratio.exp())} (n = {n:,})" for n, ratio in log_ratios(loss).items())

    def evidence(losses: Sequence[float]) -> str:
        return f"LS/MHSA of the largest logit: {'. '.join(f'At {loss}: {text(loss)}' for loss in losses)}."

    if len(lengths) < 2:
        return not_measured(MITIGATION, "There is one length.")
    needed = [name for pair in pairs.values() for name in pair]
    return judge_at_losses(MITIGATION, arms, needed, at_two_losses(outcome_at, p_at), evidence, here=text)


def judge_sooner(arms: Arms) -> Verdict:
    """Judge `SOONER` by MHSA and LS."""
    pair = (LS.name, MHSA.name)

    def log_cost(unit: str, loss: float) -> Interval:
        return log_cost_ratio_at_loss(arms[LS.name], arms[MHSA.name], unit, loss)

    def evidence(losses: Sequence[float]) -> str:
        texts = [
            f"{unit} {', '.join(f'{interval_text(log_cost(key, loss).exp())} at {loss}' for loss in losses)}"
            for key, unit in (("tokens", "tokens"), ("flops", "FLOPs"))
        ]
        return f"LS/MHSA to reach a loss: {'; '.join(texts)}."

    return judge_at_losses(
        SOONER, arms, pair,
        at_two_losses(
            lambda loss: judge_ratio(log_cost("tokens", loss).exp(), 1.0),
            lambda loss, outcome: p_of_ratio(log_cost("tokens", loss), outcome, 1.0),
        ),
        evidence,
        here=lambda loss: f"{interval_text(log_cost('tokens', loss).exp())} of the tokens",
    )  # fmt: skip


def length_sections(lengths: Mapping[int, Arms]) -> list[Section]:
    """Make the table of row ranges by length; none without results."""
    both = {name: arm for arms in lengths.values() for name, arm in arms.items()}
    if not both:
        return []
    table = loss_table(both, "row_range", "row range")
    return [Section("By sequence length", ["Means over seeds, at equal validation losses."], table=table)]


def stress_sections(stressed: Stressed) -> list[Section]:
    """Make the table of the runs at rates that may be too high; none without results."""
    if not stressed:
        return []
    rows = []
    for (name, rate), results in stressed.items():
        steps = [result["diverged_at"] for result in results if _has_diverged(result)]
        stuck = sum(map(is_stuck, results))
        rows.append(
            (
                name,
                rate_text(rate),
                f"{len(steps)} of {len(results)}",
                ", ".join(f"{step:,}" for step in steps) or "–",
                str(stuck or "–"),
                mean_text(result["validation_loss"] for result in results),
                mean_text(largest(result["probe"]["max_logit"]) for result in results),
            )
        )
    text = (
        "Runs by learning rate: those that diverged, with the steps at which they did; those that neither "
        f"diverged nor fell to {BEGUN} nats per byte; and means over seeds of the last validation loss and "
        "of the largest logit at any step."
    )
    header = ("", "rate", "diverged", "at step", "not begun to learn", "last loss", "largest logit")
    return [Section("Divergence", [text], table=Table(header, rows))]
