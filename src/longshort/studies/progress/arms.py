"""The arms of the study `progress`, and their sizes at each scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from longshort.studies.framework.comparison import rate_text
from longshort.studies.framework.study import Results, Scale, Trial
from longshort.studies.framework.sweep import Arm, Ladder
from longshort.studies.language.arms import (
    LS,
    LS_LOCAL_ROPE,
    LS_ROPE,
    MHSA,
    MHSA_ROPE,
    ONE_GPU,
    PAPER_SMALL,
    QK_NORM,
    Setting,
    Variant,
    steady,
)
from longshort.studies.language.trial import measurement_of

NO_GLOBAL = LS.with_model("LS, no global head", num_global_heads=0)
FP32 = MHSA.with_model("MHSA, fp32", attention_precision="fp32")
NO_DECAY = MHSA.with_train("MHSA, no weight decay", weight_decay=0.0)


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


@dataclass(frozen=True)
class Sizes:
    """The sizes of a scale.

    Attributes:
        pair: setting of MHSA, LS and `variants`.
        seeds: number of seeds of the pair and its variants.
        other_seeds: number of seeds of all other parts, at most as many: the first ones, but the last ones
            for what is measured on the pair's weights, of which results hold none.
        variants: further arms.
        positions: arms of other positions, of which all seeds but the first train in the setting `brief`.
        lengths: settings of MHSA and LS at other lengths.
        stress: setting of the runs that may diverge.
        stress_rates: their learning rates.
        stressed: their arms.
        fp32_rate: rate at which MHSA and LS also run in fp32; None: they do not.
        mechanism: setting of the head sizes and of hidden keys.
        needle: lengths, depths and samples of the needles that the pair and its variants retrieve after the
            training; None: they are not measured.
        audit_batches: batches on which the last weights of MHSA and LS, and of the runs that may diverge, are
            audited; 0: they are not.
        fp32_seeds: number of seeds of MHSA in fp32 beside MHSA + QK-norm, in the pair's setting; 0: neither
            is run.
        saturation: setting of MHSA without weight decay, on two seeds.
    """

    pair: Setting
    seeds: int
    other_seeds: int
    variants: Sequence[Variant] = (NO_GLOBAL,)
    positions: Sequence[Variant] = ()
    brief: Setting | None = None
    lengths: Sequence[Setting] = ()
    stress: Setting | None = None
    stress_rates: Sequence[float] = ()
    stressed: Sequence[Variant] = (MHSA, LS, QK_NORM)
    fp32_rate: float | None = None
    mechanism: Setting | None = None
    needle: Mapping[str, Any] | None = None
    audit_batches: int = 0
    fp32_seeds: int = 0
    saturation: Setting | None = None

    @property
    def main(self) -> list[Arm]:
        return [arm_at(self.pair, variant) for variant in (MHSA, LS, *self.variants)]

    def position_arms(self, first_seed: int) -> list[Arm]:
        """Return the arms of other positions, of which the first seed alone trains as long as the pair."""

        def trial(variant: Variant, rate: float, seed: int) -> Trial:
            setting = self.pair if seed == first_seed or self.brief is None else self.brief
            return setting.trial(variant, rate, seed)

        return [
            replace(arm_at(self.pair, variant), trial=partial(trial, variant)) for variant in self.positions
        ]

    @property
    def length_arms(self) -> dict[int, dict[str, Arm]]:
        """MHSA and LS by length, that of the pair among them."""
        settings = {setting.train["sequence_length"]: setting for setting in (*self.lengths, self.pair)}
        return {
            length: {
                variant.name: arm_at(setting, variant, name=f"{variant.name}, n = {length}")
                for variant in (MHSA, LS)
            }
            for length, setting in sorted(settings.items())
        }

    @property
    def mechanism_arms(self) -> list[Arm]:
        if self.mechanism is None:
            return []
        variants = (MHSA_SIZES, LS_SIZES, MHSA_HIDING, LS_HIDING)
        return [arm_at(self.mechanism, variant) for by_number in variants for variant in by_number.values()]

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
            for exact in (FP32, LS.with_model("LS, fp32", attention_precision="fp32")):
                found[exact.name, self.fp32_rate] = [
                    self.stress.trial(exact, self.fp32_rate, seed) for seed in seeds
                ]
        return found

    def pair_audits(self, seeds: Sequence[int]) -> dict[str, list[Trial]]:
        """Audits of the last weights of MHSA and LS, by name."""
        arms = {variant.name: arm_at(self.pair, variant) for variant in (MHSA, LS)}
        return self._audits({name: trials_of([arm], seeds) for name, arm in arms.items()})

    def stress_audits(self, seeds: Sequence[int]) -> dict[str, list[Trial]]:
        """Audits of the last weights of the runs that may diverge, by name."""
        return self._audits(
            {
                f"{name}, n = {trials[0].settings['train']['sequence_length']}, {rate_text(rate)}": trials
                for (name, rate), trials in self.stress_trials(seeds).items()
            }
        )

    def _audits(self, trained: Mapping[str, Sequence[Trial]]) -> dict[str, list[Trial]]:
        if not self.audit_batches:
            return {}
        return {
            name: [measurement_of(trial, "audit", {"batches": self.audit_batches}) for trial in trials]
            for name, trials in trained.items()
        }

    def main_seeds(self, seeds: Sequence[int], results: Results) -> Sequence[int]:
        """Return the seeds on which the pair is judged: all once they are done, before that the first of
        them, which are planned before all other parts."""
        are_done = all(trial.key in results for trial in trials_of(self.main, seeds))
        return seeds if are_done else seeds[: self.other_seeds]

    def needle_trials(self, seeds: Sequence[int]) -> dict[str, list[Trial]]:
        """Measurements of retrieval after the trainings of the pair and its variants, by name."""
        if self.needle is None:
            return {}
        return {
            arm.name: [measurement_of(trial, "needle", self.needle) for trial in trials_of([arm], seeds)]
            for arm in self.main
        }

    def remedy_arms(self, seeds: Sequence[int]) -> list[tuple[Arm, Sequence[int]]]:
        """Return MHSA + QK-norm and MHSA in fp32, each with its seeds."""
        if not self.fp32_seeds:
            return []
        return [(arm_at(self.pair, QK_NORM), seeds), (arm_at(self.pair, FP32), seeds[: self.fp32_seeds])]

    @property
    def saturation_arms(self) -> list[Arm]:
        return [] if self.saturation is None else [arm_at(self.saturation, NO_DECAY)]


SATURATION_SEEDS = 2


def _stress(length: int, tokens: int, steps: int) -> Setting:
    """Make the setting of runs that may diverge: all alarms are measured, often."""
    return steady(length, tokens, steps, alarms=True, monitor_every=10)


def _paper(length: int) -> Setting:
    """Make a setting of the author's small model, rate and tokens a step, 32,768 at once."""
    setting = steady(
        length, 524_288, 50_000, rates=(6e-4,), precision="bf16", warmup_steps=2000,
        micro_batch_size=32_768 // length,
    )  # fmt: skip
    return replace(
        setting,
        model=PAPER_SMALL.model,
        description=(
            "The author's small model: 6 layers, 6 heads of 32, width 192; 50,000 steps of 524,288 tokens in "
            f"sequences of {length}, a constant learning rate after the warm-up that falls to 0 over the "
            "last tenth, weight decay 0.1, autocast to bf16; LS has one global head and five with a window "
            "of 50. All arms of a seed start from the same weights and see the same batches."
        ),
    )


def _needle(*lengths: int) -> dict[str, Any]:
    return {"lengths": list(lengths), "depths": [0.1, 0.5, 0.9], "samples": 64}


def arm_at(setting: Setting, variant: Variant, name: str | None = None) -> Arm:
    """Make an arm at the setting's rates alone."""
    return Arm(name or variant.name, partial(setting.trial, variant), Ladder(setting.rates, extensions=0))


def trials_of(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Trial]:
    return [arm.trial(rate, seed) for seed in seeds for arm in arms for rate in arm.ladder.rates]


SIZES: Mapping[Scale, Sizes] = {
    "smoke": Sizes(
        steady(64, 128, 20),
        seeds=2,
        other_seeds=2,
        lengths=[steady(32, 128, 20)],
        stress=_stress(64, 128, 20),
        stress_rates=(1e-2,),
        mechanism=steady(32, 128, 4),
        needle={"lengths": [64], "depths": [0.5], "samples": 2},
        audit_batches=2,
        fp32_seeds=1,
        saturation=steady(64, 128, 16),
    ),
    "laptop": Sizes(
        steady(512, 4096, 4000),
        seeds=3,
        other_seeds=3,
        lengths=[steady(256, 4096, 3000, stop_at_loss=1.95)],
        needle=_needle(128, 512),
    ),
    "overnight": Sizes(
        steady(1024, 8192, 10_000),
        seeds=5,
        other_seeds=3,
        positions=(MHSA_ROPE, LS_ROPE, LS_LOCAL_ROPE),
        brief=steady(1024, 8192, 3000),
        lengths=[
            steady(256, 8192, 1200, stop_at_loss=1.95),
            steady(512, 8192, 2000, stop_at_loss=1.95),
            steady(2048, 8192, 10_000, stop_at_loss=1.95),
        ],
        stress=_stress(512, 4096, 3000),
        stress_rates=(1e-2, 1.7e-2, 3e-2, 6e-2),
        fp32_rate=3e-2,
        mechanism=steady(512, 8192, 2000, stop_at_loss=1.95),
        needle=_needle(128, 512, 1024),
        audit_batches=16,
        fp32_seeds=1,
        saturation=steady(1024, 8192, 8000),
    ),
    "gpu": Sizes(
        ONE_GPU,
        seeds=1,
        other_seeds=1,
        variants=(),
        stress=ONE_GPU,
        stress_rates=ONE_GPU.rates,
        stressed=(MHSA, LS),
    ),
    "paper": Sizes(
        _paper(2048),
        seeds=3,
        other_seeds=3,
        lengths=[_paper(8192)],
    ),
}
