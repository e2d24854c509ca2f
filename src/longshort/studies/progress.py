"""Study `progress` (figures 1, 3 and 4): the logits of MHSA and LS-attention at equal progress, in runs that
are long enough to learn to copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from longshort.reporting.intervals import Interval, log_or_none, paired_log_ratio, slope_interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference,
    difference_text,
    holm,
    interval_text,
    judge_below,
    mean_text,
    measure_arms,
    rate_text,
)
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Trial,
    Verdict,
    not_measured,
    unique,
)
from longshort.studies.framework.sweep import Arm, Ladder
from longshort.studies.language.alarms import WARNING, alarm_sections, judge_alarms
from longshort.studies.language.arms import LS, LS_ROPE, MHSA, MHSA_ROPE, ONE_GPU, Setting, Variant, steady
from longshort.studies.language.equal_progress import (
    BEGUN,
    LOSSES,
    LOSSES_TEXT,
    Result,
    at_loss,
    combined,
    is_alike,
    judge_at_losses,
    log_cost_ratio_at_loss,
    log_ratio_at_loss,
    losses_reached,
    p_of_two,
    ratios_text,
    sign_test,
    step_at,
)
from longshort.studies.language.measures import predict
from longshort.studies.language.trial import LanguageStudy

NO_GLOBAL = LS.with_model("LS, no global head", num_global_heads=0)
LOCAL_ROPE = LS_ROPE.with_model("LS + RoPE, none on global heads", global_position_embedding="none")
QK_NORM = MHSA.with_model("MHSA + QK-norm", qk_norm=True)
STRESSED = (MHSA, LS, QK_NORM)


def _sizes(variant: Variant, *heads: int) -> dict[int, Variant]:
    """Variants with other heads of the same width together, by head_dim."""
    return {
        64 // count: variant.with_model(
            f"{variant.name}, {count} × {64 // count}", num_attention_heads=count, head_dim=64 // count
        )
        for count in heads
    }


def _hiding(variant: Variant) -> dict[float, Variant]:
    """Variants with hidden keys, by share."""
    return {
        share: replace(variant, name=f"{variant.name}, {share:.0%} of keys hidden", hidden_keys=share)
        for share in (0.5, 0.75)
    }


MHSA_SIZES = {16: MHSA, **_sizes(MHSA, 8, 2, 1)}
LS_SIZES = {16: LS, **_sizes(LS, 8, 2)}
"""MHSA and LS with heads of other sizes, by head_dim; LS has one global head."""

MHSA_HIDING, LS_HIDING = _hiding(MHSA), _hiding(LS)
"""MHSA and LS with hidden keys, by share."""

COPYING_DROP = 0.5
"""A model copies once its loss on the second half of repeated random bytes has fallen this far below its
highest value so far, in nats per byte. The loss first rises, to 4.7 of MHSA and LS alike, as the model learns
text, which random bytes are not; it varies by 0.2 from one evaluation to the next."""

TOLERANCE = 0.02
"""Losses nearer than this, in nats per byte, are called alike."""

ALIKE = 1.1
"""Ratios that are shown to lie within this factor of 1 are called alike."""

DIVERGENCE = Claim(
    "F1, F4: divergence",
    "With MHSA the training loss begins to diverge after some steps; the same model with LS-attention is "
    "stable.",
    "LS diverges where MHSA does not, or MHSA alone diverges at no rate.",
    "Pairs of runs of MHSA and LS at the same rate and seed, rates from sound to far too high. Diverged is a "
    "loss that is not finite, or a running loss (mean of 50 steps) 0.14 nats per byte above its minimum for "
    "100 steps. Shown: MHSA diverges alone in more pairs than LS, p < 0.05 by the exact two-sided sign test. "
    "Contradicted: the same with the names exchanged. Otherwise not shown.",
)
RATIO = Claim(
    "F1: ratio of logits",
    "LS-attention keeps the largest logit below 1/20 of MHSA's.",
    "At equal progress LS's largest logit is as large as MHSA's, or larger.",
    "95 % intervals of LS/MHSA, paired over seeds, of the largest logit on 32 fixed validation windows, "
    f"where the validation loss first falls to {LOSSES_TEXT} nats per byte, at those of the losses that all "
    "runs reach at the constant rate. Shown: upper end below 1/20 at two or more losses. Partly: below 1 at "
    f"two or more. Contradicted: above 1, or alike (within a factor of {ALIKE}), at two or more and below 1 "
    "at no other. A loss that speaks against the claim makes it not shown. Open unless all runs reach two of "
    "the losses.",
)
GROWTH = Claim(
    "F3",
    "With MHSA instability and logit explosion appear at longer sequence lengths.",
    "At equal progress MHSA's logits do not grow with the sequence length, or shrink.",
    "The 95 % interval, over seeds, of the slope of log row range over log n of MHSA, where the validation "
    f"loss first falls to each of {LOSSES_TEXT} that the runs of all lengths reach. Shown: above 0 at two or "
    "more losses. Contradicted: below 0 at two or more and above 0 at none. A loss that speaks against the "
    "claim makes it not shown. Open unless all runs reach two of the losses.",
)
SOONER = Claim(
    "progress",
    "LS-attention reaches the same losses with fewer tokens.",
    "LS needs as many tokens as MHSA, or more.",
    "95 % intervals, paired over seeds, of the tokens that LS needs to reach a validation loss, relative to "
    f"MHSA's, at those of {LOSSES_TEXT} nats per byte that all runs reach at the constant rate. Shown: upper "
    f"end below 1 at two or more losses. Contradicted: above 1, or alike (within a factor of {ALIKE}), at "
    "two or more and below 1 at no other. A loss that speaks against the claim makes it not shown. Open "
    "unless all runs reach two of the losses.",
)
ENOUGH = Claim(
    "design: one global head",
    "One global head per layer is enough: more of them do not lower the loss.",
    f"With all heads global the loss is lower by more than {TOLERANCE} nats per byte.",
    "The 95 % interval of the validation loss at the end of the constant rate, all heads global minus one, "
    f"paired over seeds. Shown: lower end above −{TOLERANCE}. Contradicted: upper end below −{TOLERANCE}. "
    f"Open unless both copy on every seed: a loss on repeated random bytes {COPYING_DROP} nats per byte "
    "below its highest value before.",
)
NEEDED = Claim(
    "design: a global head",
    "A global head is needed: with local heads alone the loss is higher.",
    "Without global heads the loss is as low.",
    "The 95 % interval of the validation loss at the end of the constant rate, no global head minus one, "
    "paired over seeds. Shown: lower end above 0. Contradicted: upper end below 0. Otherwise not shown. Open "
    f"unless LS copies on every seed: a loss on repeated random bytes {COPYING_DROP} nats per byte below its "
    "highest value before.",
)
MECHANISM = Claim(
    "mechanism",
    "MHSA's logits grow because text depends densely on nearby tokens, which a head of few dimensions cannot "
    "draw: they are smaller with wider heads, and where hidden keys make the dependency sparse.",
    "At equal progress MHSA's logits are as large with wider heads and with hidden keys, or hidden keys do "
    "as much for LS.",
    "95 % intervals, paired over seeds, of the largest logit where the validation loss first falls to 2.2, "
    "2.1 and 2.0 nats per byte, at those of the losses that all runs judged here reach. (a) The slope of "
    "MHSA's log largest logit over log head_dim, 8 heads of 8 to 1 of 64, is below 0. (b) With half of the "
    "keys hidden in training, the ratio to MHSA with all keys is below 1, and below LS's ratio. Shown: both "
    "at two or more losses. Partly: one of them at two or more. Contradicted: at two or more losses neither, "
    "but a slope above 0 or a ratio of MHSA above 1, and at no other loss any of them. A loss that speaks "
    "against the claim makes it not shown. Open unless all runs reach two of the losses.",
)


@dataclass(frozen=True)
class _Scale:
    """The sizes of a scale.

    Attributes:
        pair: setting of MHSA, LS and `variants`.
        seeds: number of seeds.
        variants: further arms.
        positions: arms of other positions, whose later seeds train in the setting `brief`.
        lengths: settings of MHSA and LS at other lengths.
        stress: setting of the runs that may diverge.
        stress_rates: their learning rates.
        stressed: their arms.
        fp32_rate: rate at which MHSA and LS also run in fp32; None: they do not.
        mechanism: setting of the head sizes and of hidden keys.
    """

    pair: Setting
    seeds: int
    variants: Sequence[Variant] = (NO_GLOBAL,)
    positions: Sequence[Variant] = ()
    brief: Setting | None = None
    lengths: Sequence[Setting] = ()
    stress: Setting | None = None
    stress_rates: Sequence[float] = ()
    stressed: Sequence[Variant] = STRESSED
    fp32_rate: float | None = None
    mechanism: Setting | None = None

    @property
    def main(self) -> list[Arm]:
        return [_arm(self.pair, variant) for variant in (MHSA, LS, *self.variants)]

    @property
    def position_arms(self) -> list[Arm]:
        return [_arm(self.pair, variant, self.brief) for variant in self.positions]

    @property
    def length_arms(self) -> dict[int, dict[str, Arm]]:
        """MHSA and LS by length, that of the pair among them."""
        settings = {setting.train["sequence_length"]: setting for setting in (*self.lengths, self.pair)}
        return {
            length: {
                variant.name: _arm(setting, variant, name=f"{variant.name}, n = {length}")
                for variant in (MHSA, LS)
            }
            for length, setting in sorted(settings.items())
        }

    @property
    def mechanism_arms(self) -> list[Arm]:
        variants = (MHSA_SIZES, LS_SIZES, MHSA_HIDING, LS_HIDING)
        return [
            _arm(self.mechanism, variant)
            for by_number in variants
            for variant in by_number.values()
            if self.mechanism is not None
        ]

    def stress_trials(self, seeds: Sequence[int]) -> dict[tuple[str, float], list[Trial]]:
        """Trials by variant and rate, one per seed."""
        if self.stress is None:
            return {}
        found = {
            (variant.name, rate): [self.stress.trial(variant, rate, seed) for seed in seeds]
            for rate in self.stress_rates
            for variant in self.stressed
        }
        if self.fp32_rate is not None:
            for variant in (MHSA, LS):
                exact = variant.with_model(f"{variant.name}, fp32", attention_precision="fp32")
                found[exact.name, self.fp32_rate] = [
                    self.stress.trial(exact, self.fp32_rate, seed) for seed in seeds
                ]
        return found


def _stress(length: int, tokens: int, steps: int) -> Setting:
    """Make the setting of runs that may diverge: all alarms are measured, often."""
    return steady(length, tokens, steps, alarms=True, monitor_every=10)


def _arm(setting: Setting, variant: Variant, later: Setting | None = None, name: str | None = None) -> Arm:
    """Make an arm at the setting's rates alone; seeds after the first train in the setting `later`."""

    def trial(rate: float, seed: int) -> Trial:
        return (setting if later is None or seed == 0 else later).trial(variant, rate, seed)

    return Arm(name or variant.name, trial, Ladder(setting.rates, extensions=0))


def _trials(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Trial]:
    return [arm.trial(rate, seed) for seed in seeds for arm in arms for rate in arm.ladder.rates]


class Progress(LanguageStudy):
    """MHSA against LS-attention while both learn: logits at equal losses, lengths, and rates that are too
    high."""

    name = "progress"
    title = "Equal progress (figures 1, 3 and 4)"
    claims = (DIVERGENCE, RATIO, GROWTH, SOONER, ENOUGH, NEEDED, MECHANISM, WARNING)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(
            steady(64, 128, 20),
            seeds=2,
            lengths=[steady(32, 128, 20)],
            stress=_stress(64, 128, 20),
            stress_rates=(1e-2,),
            mechanism=steady(32, 128, 4),
        ),
        "laptop": _Scale(
            steady(512, 4096, 4000),
            seeds=3,
            lengths=[steady(256, 4096, 3000, stop_at_loss=1.95)],
            stress=_stress(512, 4096, 1000),
            stress_rates=(1e-2, 6e-2),
        ),
        "overnight": _Scale(
            steady(1024, 8192, 10_000),
            seeds=3,
            positions=(MHSA_ROPE, LS_ROPE, LOCAL_ROPE),
            brief=steady(1024, 8192, 3000),
            lengths=[
                steady(256, 8192, 1200, stop_at_loss=1.95),
                steady(512, 8192, 2000, stop_at_loss=1.95),
                steady(2048, 8192, 6000, stop_at_loss=1.95),
            ],
            stress=_stress(512, 4096, 3000),
            stress_rates=(1e-2, 1.7e-2, 3e-2, 6e-2),
            fp32_rate=3e-2,
            mechanism=steady(512, 8192, 2000, stop_at_loss=1.95),
        ),
        "gpu": _Scale(
            ONE_GPU,
            seeds=1,
            variants=(),
            stress=ONE_GPU,
            stress_rates=ONE_GPU.rates,
            stressed=(MHSA, LS),
        ),
        "paper": _Scale(
            steady(2048, 524_288, 50_000, rates=(6e-4,)),
            seeds=3,
            lengths=[steady(8192, 524_288, 50_000, rates=(6e-4,))],
        ),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        others = [
            arm for length, arms in chosen.length_arms.items() for arm in arms.values()
            if length != chosen.pair.train["sequence_length"]
        ]  # fmt: skip
        stressed = [trial for trials in chosen.stress_trials(seeds).values() for trial in trials]
        trials = [
            *_trials([*chosen.main, *chosen.position_arms], seeds[:1]),
            *_trials(chosen.main, seeds[1:]),
            *_trials(others, seeds),
            *stressed,
            *_trials(chosen.position_arms, seeds[1:]),
            *_trials(chosen.mechanism_arms, seeds),
        ]
        return Plan(unique(trials, keep="first"))

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        measured = partial(measure_arms, seeds=seeds, results=results, rates=("best",))
        arms = measured(chosen.main)
        lengths = {length: measured(by_name.values()) for length, by_name in chosen.length_arms.items()}
        stressed = {
            key: [results[trial.key] for trial in trials]
            for key, trials in chosen.stress_trials(seeds).items()
            if all(trial.key in results for trial in trials)
        }
        mechanism = measured(chosen.mechanism_arms)
        diverged = {key: [result["diverged_at"] for result in runs] for key, runs in stressed.items()}
        warmup = 0 if chosen.stress is None else chosen.stress.train["warmup_steps"]
        alarmed = [
            (rate, result)
            for (_, rate), runs in stressed.items()
            for result in runs
            if "alarm_scores" in result
        ]
        first = measure_arms(chosen.position_arms, seeds[:1], results, rates=("best",))
        verdicts = [
            _judge_divergence(diverged),
            _judge_logits(arms),
            _judge_growth(lengths),
            _judge_sooner(arms),
            _judge_enough(arms),
            _judge_needed(arms),
            _judge_mechanism(mechanism),
            judge_alarms(alarmed, warmup),
        ]
        sections = [
            *_main_sections(chosen, arms, folder),
            *_position_sections(arms, first, folder),
            *_length_sections(lengths),
            *_stress_sections(diverged),
            *alarm_sections(alarmed, warmup),
            *_mechanism_sections(chosen, mechanism, folder),
        ]
        return Findings(holm(verdicts), sections, _predictions(arms))


def _predictions(arms: Arms) -> dict[str, dict[str, Interval]]:
    """Predict another seed's losses at the end, and its logits at the losses that all seeds reach."""
    found: dict[str, dict[str, Interval]] = {}
    for name, arm in arms.items():
        found[name] = {
            quantity: predict(quantity, arm.values(quantity))
            for quantity in ("constant_loss", "validation_loss")
        }
        for loss in losses_reached(arm.results()):
            for quantity in ("max_logit", "row_range"):
                values = {
                    seed: at_loss(result, quantity, loss) for seed, result in arm.by_rate["best"].items()
                }
                found[name][f"{quantity} at {loss}"] = predict(quantity, values)
    return found


Diverged = Mapping[tuple[str, float], Sequence[int | None]]
"""The step of each seed at which it diverged, by variant and rate."""


def _judge_divergence(stressed: Diverged) -> Verdict:
    rates = sorted({rate for name, rate in stressed if name == MHSA.name and (LS.name, rate) in stressed})
    pairs = [
        (ours is not None, theirs is not None)
        for rate in rates
        for ours, theirs in zip(stressed[LS.name, rate], stressed[MHSA.name, rate], strict=True)
    ]
    if not pairs:
        return not_measured(DIVERGENCE)
    ls_alone, mhsa_alone = pairs.count((True, False)), pairs.count((False, True))
    p = sign_test(ls_alone, mhsa_alone)
    outcome = Outcome.NOT_SHOWN
    if p < 0.05:
        outcome = Outcome.SHOWN if mhsa_alone > ls_alone else Outcome.CONTRADICTED
    evidence = (
        f"Of {len(pairs)} pairs at rates {', '.join(map(rate_text, rates))}: MHSA diverged in "
        f"{sum(theirs for _, theirs in pairs)}, alone in {mhsa_alone}; LS in "
        f"{sum(ours for ours, _ in pairs)}, alone in {ls_alone}; p = {p:.2g}."
    )
    return Verdict(DIVERGENCE, outcome, evidence, p)


def _judge_logits(arms: Arms) -> Verdict:
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
        return f"LS/MHSA at equal losses: {'; '.join(texts)}."

    def log_ratio(loss: float) -> Interval:
        return log_ratio_at_loss(arms[LS.name], arms[MHSA.name], "max_logit", loss)

    return judge_at_losses(
        RATIO, arms, pair,
        lambda loss: _judge_ratio(log_ratio(loss).exp(), 1 / 20),
        lambda loss: _p_of_ratio(log_ratio(loss), 1 / 20),
        evidence,
    )  # fmt: skip


def _judge_growth(lengths: Mapping[int, Arms]) -> Verdict:
    by_length = {n: arms[f"MHSA, n = {n}"] for n, arms in lengths.items() if f"MHSA, n = {n}" in arms}
    if len(by_length) < max(2, len(lengths)):
        return not_measured(GROWTH)
    reached = losses_reached(result for arm in by_length.values() for result in arm.results())
    if len(reached) < 2:
        return Verdict(
            GROWTH, Outcome.NOT_REACHED,
            f"The runs of all lengths reach {', '.join(map(str, reached)) or 'none'} of the losses.",
        )  # fmt: skip
    slopes = {
        quantity: {loss: slope_at_loss(by_length, quantity, loss) for loss in reached}
        for quantity in ("row_range", "max_logit")
    }
    ranges, logits = (
        ", ".join(f"{difference_text(interval)} at {loss}" for loss, interval in at.items())
        for at in slopes.values()
    )
    outcome = combined([_above_zero(interval) for interval in slopes["row_range"].values()])
    evidence = f"Slope of MHSA's log row range over log n: {ranges}; of its log largest logit: {logits}."
    p = p_of_two([interval.p_value(0.0) for interval in slopes["row_range"].values()])
    return Verdict(GROWTH, outcome, evidence, p)


def slope_at_loss(by_size: Mapping[int, ArmResults], quantity: str, loss: float) -> Interval:
    """Compute the slope of log quantity over log size, such as the length, at equal loss, over seeds."""
    rows = {
        math.log(size): {
            seed: log_or_none(at_loss(result, quantity, loss)) for seed, result in arm.by_rate["best"].items()
        }
        for size, arm in by_size.items()
    }
    seeds = next(iter(rows.values()))
    return slope_interval([[(x, row[seed]) for x, row in rows.items()] for seed in seeds])


def _above_zero(interval: Interval) -> Outcome:
    if interval.low > 0:
        return Outcome.SHOWN
    return Outcome.CONTRADICTED if interval.high < 0 else Outcome.NOT_SHOWN


def _judge_sooner(arms: Arms) -> Verdict:
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
        lambda loss: _judge_ratio(log_cost("tokens", loss).exp(), 1.0),
        lambda loss: _p_of_ratio(log_cost("tokens", loss), 1.0),
        evidence,
    )  # fmt: skip


def _judge_ratio(interval: Interval, shown: float) -> Outcome:
    """Judge a ratio at one loss that is claimed to be below `shown`, at most 1."""
    if is_alike(interval, ALIKE):
        return Outcome.CONTRADICTED
    return judge_below(interval, shown, 1.0)


def _p_of_ratio(log_ratio: Interval, shown: float) -> float:
    """Compute the p-value of what `_judge_ratio` says: against `shown`, against 1, or against the bounds of
    likeness."""
    if is_alike(log_ratio.exp(), ALIKE):
        return max(log_ratio.p_value(math.log(ALIKE)), log_ratio.p_value(-math.log(ALIKE)))
    bound = math.log(shown)
    return log_ratio.p_value(bound if log_ratio.high < bound else 0.0)


def _judge_enough(arms: Arms) -> Verdict:
    def outcome(change: Interval) -> Outcome:
        if change.low > -TOLERANCE:
            return Outcome.SHOWN
        return Outcome.CONTRADICTED if change.high < -TOLERANCE else Outcome.NOT_SHOWN

    return _judge_design(ENOUGH, arms, (MHSA.name, LS.name), (MHSA.name, LS.name), outcome, -TOLERANCE)


def _judge_needed(arms: Arms) -> Verdict:
    return _judge_design(NEEDED, arms, (NO_GLOBAL.name, LS.name), (LS.name,), _above_zero, 0.0)


def _judge_design(
    claim: Claim,
    arms: Arms,
    pair: tuple[str, str],
    copying: Sequence[str],
    outcome_of: Callable[[Interval], Outcome],
    bound: float,
) -> Verdict:
    """Judge the difference of the losses of two arms against a bound; open unless the `copying` ones copy."""
    if any(name not in arms for name in pair):
        return not_measured(claim)
    first, second = (arms[name] for name in pair)
    change = difference(first, second, "constant_loss")
    scores = {name: mean_text(_copying_loss(result) for result in arms[name].results()) for name in pair}
    evidence = (
        f"{pair[0]} − {pair[1]}: {difference_text(change)} nats per byte at the end of the constant rate, "
        f"{difference_text(difference(first, second, 'validation_loss'))} after the decay. Loss on repeated "
        f"random bytes: {', '.join(f'{name} {score}' for name, score in scores.items())}."
    )
    late = [
        name for name in copying
        if any(copying_step(result) is None for result in arms[name].results())
    ]  # fmt: skip
    if late:
        return Verdict(
            claim, Outcome.NOT_REACHED, f"{', '.join(late)} did not copy on every seed. {evidence}"
        )
    return Verdict(claim, outcome_of(change), evidence, change.p_value(bound))


def _judge_mechanism(arms: Arms) -> Verdict:
    half = {plain: hiding[0.5].name for plain, hiding in ((MHSA.name, MHSA_HIDING), (LS.name, LS_HIDING))}
    needed = [*(variant.name for variant in MHSA_SIZES.values()), LS.name, *half.values()]

    def slope_over_head_dim(sizes: Mapping[int, Variant], loss: float) -> Interval:
        return slope_at_loss({dim: arms[variant.name] for dim, variant in sizes.items()}, "max_logit", loss)

    def hiding_ratios(name: str, loss: float) -> dict[int, float | None]:
        """The ratio of the largest logit with half of the keys hidden to that with all keys, by seed."""
        hiding, plain = (arms[arm].by_rate["best"] for arm in (half[name], name))
        return {
            seed: _ratio(at_loss(hiding[seed], "max_logit", loss), at_loss(plain[seed], "max_logit", loss))
            for seed in hiding
        }

    def intervals(loss: float) -> tuple[Interval, Interval, Interval]:
        """The slope, and the logarithms of MHSA's ratio and of its relation to LS's."""
        return (
            slope_over_head_dim(MHSA_SIZES, loss),
            log_ratio_at_loss(arms[half[MHSA.name]], arms[MHSA.name], "max_logit", loss),
            paired_log_ratio(hiding_ratios(MHSA.name, loss), hiding_ratios(LS.name, loss)),
        )

    def outcome_at(loss: float) -> Outcome:
        slope, ratio, to_ls = intervals(loss)
        held = [slope.high < 0, ratio.high < 0 and to_ls.high < 0]
        if any(held):
            return Outcome.SHOWN if all(held) else Outcome.PARTLY
        return Outcome.CONTRADICTED if slope.low > 0 or ratio.low > 0 else Outcome.NOT_SHOWN

    def p_at(loss: float) -> float:
        slope, ratio, to_ls = (interval.p_value(0.0) for interval in intervals(loss))
        outcome = outcome_at(loss)
        if outcome is Outcome.SHOWN:
            return max(slope, ratio, to_ls)
        hiding = ratio if outcome is Outcome.CONTRADICTED else max(ratio, to_ls)
        return min(1.0, 2 * min(slope, hiding))  # one of two is enough

    def evidence(losses: Sequence[float]) -> str:
        texts = []
        for name, sizes in ((MHSA.name, MHSA_SIZES), (LS.name, LS_SIZES)):
            if all(variant.name in arms for variant in sizes.values()):
                slopes = (f"{difference_text(slope_over_head_dim(sizes, loss))} at {loss}" for loss in losses)
                texts.append(f"slope of {name}'s log largest logit over log head_dim {', '.join(slopes)}")
        for plain, hiding in ((MHSA, MHSA_HIDING), (LS, LS_HIDING)):
            for variant in hiding.values():
                results = arms[variant.name].results() if variant.name in arms else []
                reached = losses_reached(results, losses) if results else []
                if reached:
                    ratios = ratios_text(arms[variant.name], arms[plain.name], "max_logit", reached)
                    texts.append(f"{variant.name}, ratio to {plain.name} with all keys {ratios}")
        return f"At equal losses: {'; '.join(texts)}."

    return judge_at_losses(MECHANISM, arms, needed, outcome_at, p_at, evidence)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def copying_step(result: Result) -> int | None:
    """Return the first step at which a run copies, at the constant rate; None if it never does."""
    highest = -math.inf
    for step, loss in result["copying_curve"]:
        if step > result["constant_until"]:
            break
        if loss is not None:
            highest = max(highest, loss)
            if loss <= highest - COPYING_DROP:
                return step
    return None


def _copying_loss(result: Result) -> float | None:
    """The loss of copying at the end of the constant rate."""
    return [loss for step, loss in result["copying_curve"] if step <= result["constant_until"]][-1]


def _main_sections(chosen: _Scale, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    panels = [
        _by_progress(arms, "Largest logit by progress", "max_logit"),
        _by_progress(arms, "Row range by progress", "row_range"),
        _by_tokens(arms, "Validation loss", "validation_curve", "nats per byte"),
        _by_tokens(arms, "Loss of copying", "copying_curve", "nats per byte"),
    ]
    return [
        Section(
            "MHSA against LS-attention, at equal progress",
            [chosen.pair.description],
            table=_transition_table(arms),
            figures=[
                Figure(
                    draw_curves(panels, folder / "progress.png"),
                    "Above: on 32 fixed validation windows, over the validation loss there, which falls from "
                    "right to left while a model learns. Below: by tokens. A line per seed; where the seeds "
                    "share their steps, thick: the mean.",
                )
            ],
        )
    ]


def _position_sections(main: Arms, arms: Arms, folder: Path) -> list[Section]:
    if not arms:
        return []
    both = {**{name: main[name] for name in (MHSA.name, LS.name) if name in main}, **arms}
    panels = [
        _by_progress(both, "Row range by progress", "row_range"),
        _by_tokens(both, "Validation loss", "validation_curve", "nats per byte"),
    ]
    return [
        Section(
            "Positions",
            ["Learned positions beside rotary ones, on the first seed."],
            table=_transition_table(arms),
            figures=[Figure(draw_curves(panels, folder / "positions.png"), "As above.")],
        )
    ]


def _by_progress(arms: Arms, title: str, quantity: str) -> Panel:
    def curve(result: Result) -> list[tuple[float, float | None]]:
        losses = {step: loss for step, loss in result["validation_curve"] if step <= result["constant_until"]}
        values = zip(result["probe"]["step"], result["probe"][quantity], strict=True)
        return [(losses[step], value) for step, value in values if losses.get(step) is not None]

    lines = {name: [curve(result) for result in arm.results()] for name, arm in arms.items()}
    return Panel(title, "validation loss (nats per byte)", "logits", lines)


def _by_tokens(arms: Arms, title: str, name: str, y: str) -> Panel:
    lines = {
        arm_name: [
            [(1e-6 * step * result["tokens_per_step"], value) for step, value in result[name]]
            for result in arm.results()
        ]
        for arm_name, arm in arms.items()
    }
    return Panel(title, "million tokens", y, lines)


def _transition_table(arms: Arms) -> Table:
    """A row per arm: what it spends to leave the plateau, to each loss and to the copying drop."""
    rows = []
    for name, arm in arms.items():
        results = arm.results()

        def tokens(steps: Sequence[float | None], per_step: float = results[0]["tokens_per_step"]) -> str:
            known = [step for step in steps if step is not None]
            if not known:
                return "–"
            mean = number(1e-6 * per_step * math.exp(sum(map(math.log, known)) / len(known)))
            return mean if len(known) == len(steps) else f"{mean} ({len(known)} of {len(steps)} runs)"

        rows.append(
            (
                name,
                *(tokens([step_at(result, loss) for result in results]) for loss in (BEGUN, *LOSSES)),
                tokens([copying_step(result) for result in results]),
                mean_text(result["constant_loss"] for result in results),
                mean_text(result["validation_loss"] for result in results),
            )
        )
    header = ("", *(f"to {loss}" for loss in (BEGUN, *LOSSES)), "to copying", "loss", "after decay")
    return Table(header, rows)


def _length_sections(lengths: Mapping[int, Arms]) -> list[Section]:
    rows = []
    for arms in lengths.values():
        for name, arm in arms.items():
            cells = []
            for loss in LOSSES:
                values = [at_loss(result, "row_range", loss) for result in arm.results()]
                cells.append("–" if None in values else mean_text(values))
            rows.append((name, *cells))
    if not rows:
        return []
    table = Table(("row range at a loss of", *map(str, LOSSES)), rows)
    return [Section("By sequence length", ["Means over seeds, at equal validation losses."], table=table)]


def _stress_sections(stressed: Diverged) -> list[Section]:
    if not stressed:
        return []
    rows = [
        (name, rate_text(rate), f"{sum(step is not None for step in steps)} of {len(steps)}",
         ", ".join(f"{step:,}" for step in steps if step is not None) or "–")
        for (name, rate), steps in stressed.items()
    ]  # fmt: skip
    text = "Runs that diverged, by learning rate, with the steps at which they did."
    return [Section("Divergence", [text], table=Table(("", "rate", "diverged", "at step"), rows))]


def _mechanism_sections(chosen: _Scale, arms: Arms, folder: Path) -> list[Section]:
    if chosen.mechanism is None or not arms:
        return []
    rows = [
        (name, *("–" if None in values else mean_text(values) for values in (
            [at_loss(result, "max_logit", loss) for result in arm.results()] for loss in LOSSES
        )))
        for name, arm in arms.items()
    ]  # fmt: skip
    panels = [
        _by_progress({name: arm for name, arm in arms.items() if is_in(name)}, title, "max_logit")
        for title, is_in in (
            ("Largest logit, heads of other sizes", lambda name: "hidden" not in name),
            (
                "Largest logit, with hidden keys",
                lambda name: name in (MHSA.name, LS.name) or "hidden" in name,
            ),
        )
    ]
    return [
        Section(
            "Mechanism",
            [
                chosen.mechanism.description,
                (
                    "Hidden keys: a random share of the keys of each sequence is hidden from all heads in "
                    "training; a query always sees itself. Losses and logits are measured with all keys."
                ),
            ],
            table=Table(("largest logit at a loss of", *map(str, LOSSES)), rows),
            figures=[
                Figure(
                    draw_curves(panels, folder / "mechanism.png"),
                    "On 32 fixed validation windows, over the validation loss there.",
                )
            ],
        )
    ]
