"""Study `progress` (figures 1, 3, 4 and 5): the logits of MHSA and LS-attention at equal progress, in runs
that are long enough to learn to copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval
from longshort.studies.framework.comparison import Arms, holm, measure_arms, rate_text
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Trial,
    Workplace,
    finished,
    not_measured,
    unique,
)
from longshort.studies.language.alarms import WARNING, alarm_sections, judge_alarms
from longshort.studies.language.arms import LS
from longshort.studies.language.equal_progress import is_stuck, losses_reached, values_at_loss
from longshort.studies.language.measures import predict
from longshort.studies.language.trial import LanguageStudy
from longshort.studies.progress.arms import NO_GLOBAL, SATURATION_SEEDS, SIZES, Sizes, trials_of
from longshort.studies.progress.design import ENOUGH, NEEDED, judge_enough, judge_needed
from longshort.studies.progress.figures import clock_sections, main_sections, position_sections
from longshort.studies.progress.logits import (
    DIVERGENCE,
    GROWTH,
    MITIGATION,
    RATIO,
    SOONER,
    judge_divergence,
    judge_growth,
    judge_logits,
    judge_mitigation,
    judge_sooner,
    length_sections,
    stress_sections,
)
from longshort.studies.progress.mechanism import MECHANISM, judge_mechanism, mechanism_sections
from longshort.studies.progress.needle import needle_sections, run_needle
from longshort.studies.progress.overview import overview_sections
from longshort.studies.progress.precision import precision_sections, run_audit
from longshort.studies.progress.remedies import REMEDIES, judge_remedies, remedy_sections
from longshort.studies.progress.saturation import saturation_sections


class Progress(LanguageStudy):
    """MHSA against LS-attention while both learn: logits at equal losses, lengths, and rates that are too
    high."""

    name = "progress"
    title = "Equal progress (figures 1, 3, 4 and 5)"
    claims = (DIVERGENCE, RATIO, GROWTH, MITIGATION, SOONER, ENOUGH, NEEDED, MECHANISM, WARNING, REMEDIES)
    scales: Mapping[Scale, Sizes] = SIZES

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        few, last = seeds[: chosen.other_seeds], seeds[-chosen.other_seeds :]

        def each(by_name: Mapping[Any, Sequence[Trial]]) -> list[Trial]:
            return [trial for trials in by_name.values() for trial in trials]

        trials = [
            *trials_of([*chosen.main, *chosen.position_arms(seeds[0])], seeds[:1]),
            *trials_of(chosen.main, few[1:]),
            *trials_of([arm for arms in chosen.length_arms.values() for arm in arms.values()], few),
            *each(chosen.stress_trials(few)),
            *each(chosen.stress_audits(few)),
            *trials_of(chosen.main, seeds[len(few) :]),
            *each(chosen.pair_audits(last)),
            *each(chosen.needle_trials(last)),
            *trials_of(chosen.position_arms(seeds[0]), few[1:]),
            *trials_of(chosen.mechanism_arms, few),
            *(trial for arm, its in chosen.remedy_arms(few) for trial in trials_of([arm], its)),
            *trials_of(chosen.saturation_arms, few[:SATURATION_SEEDS]),
        ]
        return Plan(unique(trials, keep="first"))

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        if "audit" in trial.settings:
            return run_audit(trial, workplace)
        return run_needle(trial, workplace) if "needle" in trial.settings else super().run(trial, workplace)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        few, last = seeds[: chosen.other_seeds], seeds[-chosen.other_seeds :]
        main_seeds = chosen.main_seeds(seeds, results)
        measured = partial(measure_arms, seeds=few, results=results, rates=("best",))
        arms = measured(chosen.main, seeds=main_seeds)
        lengths = {length: measured(by_name.values()) for length, by_name in chosen.length_arms.items()}
        others = {
            name: arm
            for length, by_name in lengths.items() if length != chosen.pair.train["sequence_length"]
            for name, arm in by_name.items()
        }  # fmt: skip
        stressed = finished(chosen.stress_trials(few), results)
        mechanism = measured(chosen.mechanism_arms)
        warmup = 0 if chosen.stress is None else chosen.stress.train["warmup_steps"]
        alarmed = [
            (rate, result)
            for (_, rate), runs in stressed.items()
            for result in runs
            if "alarm_scores" in result and not is_stuck(result)
        ]
        are_stressed = len(stressed) == len(chosen.stress_trials(few))
        positions = chosen.position_arms(seeds[0])
        first = measured(positions, seeds=seeds[:1])
        remedies = {name: arms[name] for name in (LS.name,) if name in arms}
        for arm, its in chosen.remedy_arms(few):
            remedies |= measured([arm], seeds=its)
        undecayed = {**arms, **measured(chosen.saturation_arms, seeds=few[:SATURATION_SEEDS])}
        needles = finished(chosen.needle_trials(last), results)
        verdicts = [
            judge_divergence(stressed if are_stressed else {}),
            judge_logits(arms),
            judge_growth(lengths),
            judge_mitigation(lengths),
            judge_sooner(arms),
            judge_enough(arms, needles),
            judge_needed(arms, needles),
            judge_mechanism(mechanism),
            judge_alarms(alarmed if are_stressed else [], warmup),
            judge_remedies(remedies),
        ]
        done = {
            arm.name: [results[t.key] for t in trials_of([arm], seeds) if t.key in results]
            for arm in chosen.main
            if len(arm.ladder.rates) == 1
        }
        sections = [
            *overview_sections(done, folder),
            *main_sections(chosen, arms, folder),
            *needle_sections(needles),
            *position_sections(arms, first, measured(positions), folder),
            *length_sections(lengths),
            *clock_sections({**arms, **first, **others}),
            *stress_sections(stressed),
            *alarm_sections(alarmed, warmup),
            *precision_sections(finished({**chosen.pair_audits(last), **chosen.stress_audits(few)}, results)),
            *mechanism_sections(chosen, mechanism, folder),
            *remedy_sections(remedies, folder),
            *saturation_sections(undecayed, folder),
        ]
        absent = _absent(chosen)
        verdicts = [
            not_measured(verdict.claim, "Not part of this scale.") if verdict.claim in absent else verdict
            for verdict in verdicts
        ]
        is_complete = all(trial.key in results for trial in self.plan(scale, seeds, results).trials)
        pending = 0 if is_complete else sum(
            verdict.outcome is Outcome.NOT_MEASURED and verdict.claim not in absent for verdict in verdicts
        )  # fmt: skip
        told = _tested(chosen, few)
        verdicts = [
            replace(verdict, tested=told.get(verdict.claim.id, "")) for verdict in holm(verdicts, pending)
        ]
        return Findings(
            verdicts, sections, _predictions({**arms, **others}), chosen.pair.extent(len(main_seeds))
        )


def _absent(chosen: Sizes) -> set[Claim]:
    """Return the claims for which a scale has no trials."""
    found: set[Claim] = set()
    for is_there, claims in (
        (chosen.stress is not None, (DIVERGENCE,)),
        (chosen.stress is not None and "alarms" in chosen.stress.train, (WARNING,)),
        (len(chosen.length_arms) > 1, (GROWTH, MITIGATION)),
        (NO_GLOBAL in chosen.variants, (NEEDED,)),
        (chosen.mechanism is not None, (MECHANISM,)),
        (chosen.fp32_seeds > 0, (REMEDIES,)),
    ):
        if not is_there:
            found |= set(claims)
    return found


def _tested(chosen: Sizes, seeds: Sequence[int]) -> dict[str, str]:
    """Say how far claims were tested that do not rest on the pair, by id."""
    found = {}
    if chosen.stress is not None:
        rates = f"rates to {rate_text(max(chosen.stress_rates))}"
        found |= dict.fromkeys((DIVERGENCE.id, WARNING.id), f"{chosen.stress.extent(len(seeds))}, {rates}")
    if chosen.mechanism is not None:
        found[MECHANISM.id] = chosen.mechanism.extent(len(seeds))
    if chosen.fp32_seeds:
        found[REMEDIES.id] = f"{chosen.pair.extent(len(seeds))}, {chosen.fp32_seeds} in fp32"
    lengths = list(chosen.length_arms)
    told = f"n = {lengths[0]:,} to {lengths[-1]:,}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return found | dict.fromkeys((GROWTH.id, MITIGATION.id), told)


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
                found[name][f"{quantity} at {loss}"] = predict(quantity, values_at_loss(arm, quantity, loss))
    return found
