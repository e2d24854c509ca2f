"""Study `explosion` (figures 1 and 4): do the logits of MHSA explode when those of LS-attention do not, and
for the reason that the paper gives?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval, confidence_interval
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_intervals
from longshort.studies.framework.comparison import (
    ArmResults,
    Arms,
    difference_text,
    interval_text,
    judge,
    judge_below,
    measure_arms,
    rate_text,
    ratio,
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
from longshort.studies.framework.sweep import RATES, Arm, Rate, plan_arms
from longshort.studies.language.arms import (
    DEEP_LS,
    HYBRID,
    LS,
    MHSA,
    MHSA_ROPE,
    PAPER_SMALL,
    Setting,
    Variant,
    model_config,
    tiny,
)
from longshort.studies.language.measures import (
    arm_table,
    curves,
    loss_difference,
    loss_difference_at_equal_flops,
    predictions,
    split_by_depth,
    sweep_section,
)
from longshort.studies.language.trial import LanguageStudy, largest

ALIBI = MHSA.with_model("MHSA + ALiBi", position_embedding="alibi")
CONVOLUTION = MHSA.with_model("MHSA + convolution", short_convolution=4)
PERMUTED = MHSA.with_train("MHSA, permuted text", token_order="permuted")
EXPLANATIONS = (MHSA_ROPE, ALIBI, CONVOLUTION)
TEXT_ORDERS = (
    MHSA.with_train("MHSA, interleaved text", token_order="interleaved"),
    LS.with_train("LS, permuted text", token_order="permuted"),
    LS.with_train("LS, interleaved text", token_order="interleaved"),
)
PRECISIONS = tuple(
    variant.with_model(f"{variant.name}, {precision}", attention_precision=precision)
    for precision in ("fp32", "bf16-flash")
    for variant in (MHSA, LS)
)

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
"""The step at which each seed diverged, by setting and arm."""


@dataclass(frozen=True)
class _Scale:
    setting: Setting
    seeds: int
    controls: Sequence[Variant] = ()
    stress_rate: float = 1e-2
    depths: Sequence[int] = ()
    lengths: Sequence[int] = ()
    precisions: Sequence[str] = ()
    map_rates: Sequence[float] = ()

    @property
    def pair(self) -> list[Arm]:
        return self.setting.arms((MHSA, LS))

    @property
    def others(self) -> list[Arm]:
        return self.setting.arms((PERMUTED, *EXPLANATIONS, *self.controls))

    @property
    def map(self) -> dict[str, tuple[Setting, float]]:
        """Return settings and rates: learning rate × length × precision × depth, at equal tokens a step."""
        tokens = self.setting.train["batch_size"] * self.setting.train["sequence_length"]
        found = {}
        for depth in self.depths:
            for length in self.lengths:
                train = {
                    **self.setting.train, "sequence_length": length, "batch_size": max(1, tokens // length)
                }  # fmt: skip
                for precision in self.precisions:
                    model = {
                        **self.setting.model, "num_hidden_layers": depth, "attention_precision": precision
                    }  # fmt: skip
                    setting = replace(self.setting, model=model, train=train)
                    for rate in self.map_rates:
                        name = f"{depth} layers, n = {length}, {precision}, rate {rate_text(rate)}"
                        found[name] = (setting, rate)
        return found

    def stress_trials(self, seeds: Sequence[int]) -> list[Trial]:
        return [arm.trial(self.stress_rate, seed) for arm in self.pair for seed in seeds]

    def map_trials(self, seeds: Sequence[int]) -> list[Trial]:
        return [
            setting.trial(variant, rate, seed)
            for setting, rate in self.map.values()
            for variant in (MHSA, LS)
            for seed in seeds
        ]


class Explosion(LanguageStudy):
    """A comparison of MHSA and LS-attention, with arms and texts that test the paper's explanation."""

    name = "explosion"
    title = "Logit explosion and divergence (figures 1 and 4)"
    claims = (DIVERGENCE, RATIO, MECHANISM)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(tiny(64, batch=2, steps=12), seeds=2),
        "laptop": _Scale(tiny(512, batch=4, steps=2000), seeds=3),
        "overnight": _Scale(
            tiny(512, batch=4, steps=4000),
            seeds=5,
            controls=(*TEXT_ORDERS, *PRECISIONS, DEEP_LS, HYBRID),
            stress_rate=3e-2,
            depths=(2, 4),
            lengths=(512, 2048),
            precisions=("bf16", "bf16-flash"),
            map_rates=(3e-3, 1e-2, 3e-2),
        ),
        "paper": _Scale(PAPER_SMALL, seeds=3, controls=TEXT_ORDERS, stress_rate=6e-3),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        main = plan_arms(chosen.pair, seeds, results)
        rest = plan_arms(chosen.others, seeds, results)
        trials = [
            *main.trials, *chosen.stress_trials(seeds), *rest.trials, *chosen.map_trials(seeds[:3])
        ]  # fmt: skip
        return Plan(unique(trials), main.later_work + rest.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms([*chosen.pair, *chosen.others], seeds, results)
        diverged = _divergences(chosen, seeds, results)
        verdicts = [_judge_divergence(diverged), _judge_ratio(arms), _judge_mechanism(arms)]
        sections = [*_sections(chosen, arms, folder), _divergence_section(diverged)]
        return Findings(verdicts, sections, predictions(arms))


def _divergences(chosen: _Scale, seeds: Sequence[int], results: Results) -> Divergences:
    swept = plan_arms(chosen.pair, seeds[:1], results).trials
    rates = {trial.settings["train"]["learning_rate"] for trial in (*swept, *chosen.stress_trials(seeds[:1]))}
    settings = {f"rate {rate_text(rate)}": (chosen.setting, rate, seeds) for rate in sorted(rates)}
    settings |= {name: (*at, seeds[:3]) for name, at in chosen.map.items()}
    found: dict[str, dict[str, list[int | None]]] = {}
    for name, (setting, rate, at) in settings.items():
        rows: dict[str, list[int | None]] = {}
        for variant in (MHSA, LS):
            known = [results.get(setting.trial(variant, rate, seed).key) for seed in at]
            rows[variant.name] = [result["diverged_at"] for result in known if result is not None]
        if all(len(row) == len(at) for row in rows.values()):
            found[name] = rows
    return found


def _judge_divergence(diverged: Divergences) -> Verdict:
    if all(len(rows[MHSA.name]) < 2 for rows in diverged.values()):
        return not_measured(DIVERGENCE, "No setting was run on at least two seeds.")

    def alone(first: str, second: str) -> list[str]:
        return [
            setting
            for setting, rows in diverged.items()
            if _count(rows[first]) >= max(2, 2 * len(rows[first]) / 3) and _count(rows[second]) == 0
        ]

    as_claimed, reverse = alone(MHSA.name, LS.name), alone(LS.name, MHSA.name)
    counts = {name: sum(_count(rows[name]) for rows in diverged.values()) for name in (MHSA.name, LS.name)}
    runs = sum(len(rows[MHSA.name]) for rows in diverged.values())
    evidence = (
        f"{counts[MHSA.name]} of {runs} runs of MHSA and {counts[LS.name]} of {runs} of LS diverged, over "
        f"{len(diverged)} settings."
    )
    if as_claimed:
        return Verdict(DIVERGENCE, Outcome.SHOWN, f"{evidence} MHSA alone: {'; '.join(as_claimed)}.")
    if reverse:
        return Verdict(DIVERGENCE, Outcome.CONTRADICTED, f"{evidence} LS alone: {'; '.join(reverse)}.")
    return Verdict(DIVERGENCE, Outcome.NOT_SHOWN, evidence)


def _count(steps: Sequence[int | None]) -> int:
    return sum(step is not None for step in steps)


def _judge_ratio(arms: Arms) -> Verdict:
    def compared(quantity: str, rate: Rate = "best") -> Interval:
        return ratio(arms[LS.name], arms[MHSA.name], quantity, rate)

    def evidence() -> str:
        best, lower, in_band, row_range = map(
            interval_text,
            (
                *(compared("max_logit", rate) for rate in RATES),
                compared("max_logit_in_band"),
                compared("row_range"),
            ),
        )
        equal_steps, equal_flops = (
            difference_text(rule(arms[LS.name], arms[MHSA.name]))
            for rule in (loss_difference, loss_difference_at_equal_flops)
        )
        return (
            f"LS/MHSA is {best} at the best rates and {lower} at the next lower ones. Inside the window, "
            f"over equal sets of pairs: {in_band}; of the row ranges: {row_range}. Validation loss, LS − "
            f"MHSA: {equal_steps} nats per token at equal steps, {equal_flops} at equal FLOPs."
        )

    return judge(
        RATIO, arms, (LS.name, MHSA.name),
        lambda rate: judge_below(compared("max_logit", rate), 1 / 20, 1.0),
        evidence,
    )  # fmt: skip


def _judge_mechanism(arms: Arms) -> Verdict:
    tests = [variant.name for variant in (PERMUTED, *EXPLANATIONS)]

    def ratios(rate: Rate) -> dict[str, Interval]:
        return {name: ratio(arms[name], arms[MHSA.name], "max_logit", rate) for name in tests}

    def growth(rate: Rate) -> float:
        return _late_growth(arms[MHSA_ROPE.name], rate).mean

    def text(rate: Rate) -> str:
        numbers = "; ".join(f"{name} {interval_text(interval)}" for name, interval in ratios(rate).items())
        return (
            f"At the {'best' if rate == 'best' else 'next lower'} rates, relative to MHSA with learned "
            f"positions: {numbers}. MHSA + RoPE's largest logit grows {growth(rate):.2f} times over the "
            "second half."
        )

    return judge(
        MECHANISM, arms, (MHSA.name, *tests),
        lambda rate: _mechanism_outcome(ratios(rate), growth(rate)),
        lambda: " ".join(map(text, RATES)),
    )  # fmt: skip


def _mechanism_outcome(ratios: Mapping[str, Interval], rope_growth: float) -> Outcome:
    """Return the outcome by the ratios to MHSA, and by RoPE's growth over the second half."""
    permuted, *others = ratios.values()
    below = [interval.high < 1 for interval in others]
    if all(interval.low > 1 for interval in ratios.values()):
        return Outcome.CONTRADICTED
    if not permuted.high < 1 or not any(below) or not rope_growth > FLAT:
        return Outcome.NOT_SHOWN
    return Outcome.SHOWN if all(below) else Outcome.PARTLY


def _late_growth(arm: ArmResults, rate: Rate) -> Interval:
    """Compute the factor between the largest logit at half of the training and at its end, as means over the
    last tenths of the curves."""
    ratios: list[float | None] = []
    for curve in curves(arm, "max_logit", rate):
        last = curve[-1][0]
        end = [value for step, value in curve if step > 0.9 * last]
        middle = [value for step, value in curve if 0.4 * last < step <= 0.5 * last]
        before, after = largest(middle), largest(end)
        ratios.append(None if before is None or after is None else after / before)
    return confidence_interval(ratios)


def _sections(chosen: _Scale, arms: Arms, folder: Path) -> list[Section]:
    main = {name: arm for name, arm in arms.items() if name in (MHSA.name, LS.name)}
    plain, deep = split_by_depth(arms)
    tests = {name: arm for name, arm in plain.items() if name != LS.name}
    sections = []
    if len(main) == 2:
        sections.append(
            Section(
                "MHSA against LS-attention",
                [chosen.setting.description],
                table=arm_table(main),
                figures=[
                    Figure(
                        draw_curves(
                            [
                                _loss_panel(main),
                                _logit_panel(main, "Largest logit, all visible pairs"),
                                _logit_panel(main, "Largest logit inside the window", "max_logit_in_band"),
                                Panel(
                                    "Row range (max − min of a query)", "step", "logits",
                                    _curves(main, "row_range"),
                                ),
                            ],
                            folder / "explosion.png",
                        ),
                        "Thick: mean over seeds, each arm at its best rate; faint: the seeds. Logits are the "
                        "largest |scale · q·k| over all visible pairs; inside the window both are measured "
                        "over the same pairs.",
                    ),
                    Figure(
                        draw_curves(_head_panels(main), folder / "heads.png"),
                        "Largest logits by layer, local and global heads apart.",
                    ),
                ],
            )
        )  # fmt: skip
    if len(tests) > 1 and MHSA.name in tests:
        ratios = [
            (name, ratio(arm, arms[MHSA.name], "max_logit"))
            for name, arm in tests.items()
            if name != MHSA.name
        ]
        sections.append(
            Section(
                "Why do they grow?",
                [
                    ("RoPE, ALiBi and a short convolution on q, k and v give full attention a sense of what "
                    "is near; permuted text has as many dependencies, none of them local. Losses of permuted "
                    "and interleaved text do not compare with the others. RoPE and ALiBi have no position "
                    "table, so fewer parameters; all weights that two arms share start alike.")
                ],
                table=arm_table(tests),
                figures=[
                    Figure(
                        draw_curves(
                            [_loss_panel(tests), _logit_panel(tests, "Largest logit")],
                            folder / "mechanism.png",
                        ),
                        "As above.",
                    ),
                    Figure(
                        draw_intervals(
                            ratios, folder / "mechanism_ratios.png", "Largest logit relative to MHSA",
                            "ratio to MHSA with learned positions", references={1.0: "alike"}, log=True,
                        ),
                        "Means and 95 % intervals of the paired ratio, at the best rates.",
                    ),
                ],
            )
        )  # fmt: skip
    if deep:
        text = "Four layers and four global heads: one in each layer, or all in the last, as in Gemma 3."
        sections.append(Section("The hybrid by layers", [text], table=arm_table(deep)))
    return [*sections, sweep_section(arms)] if arms else sections


def _curves(arms: Arms, name: str) -> dict[str, Any]:
    return {arm: curves(results, name) for arm, results in arms.items()}


def _loss_panel(arms: Arms) -> Panel:
    return Panel("Training loss", "step", "nats per token", _curves(arms, "loss_curve"))


def _logit_panel(arms: Arms, title: str, quantity: str = "max_logit") -> Panel:
    return Panel(title, "step", "largest |scale · q·k|", _curves(arms, quantity))


def _head_panels(main: Arms) -> list[Panel]:
    """Make a panel per arm with the largest logit of each layer and kind of head, a line per seed."""
    panels = []
    for name, arm in main.items():
        lines: dict[str, list[Any]] = {}
        config = model_config(arm.settings["model"], arm.settings["train"])
        for layer, layout in enumerate(config.head_layouts()):
            for kind, heads in (("global", layout.global_heads), ("local", layout.local_heads)):
                if heads:
                    lines[f"layer {layer}, {kind}"] = [
                        [
                            (step, largest(rows[layer][head] for head in heads))
                            for step, rows in result["max_logit_by_head"]
                        ]
                        for result in arm.results()
                    ]
        panels.append(Panel(f"{name}, by layer and kind of head", "step", "largest |scale · q·k|", lines))
    return panels


def _divergence_section(diverged: Divergences) -> Section:
    rows = [
        (setting, *(_divergence_text(by_arm[variant.name]) for variant in (MHSA, LS)))
        for setting, by_arm in diverged.items()
    ]
    return Section(
        "Divergence",
        ["Runs that diverged, by setting, with the steps at which they did."],
        table=Table(("setting", MHSA.name, LS.name), rows),
    )


def _divergence_text(steps: Sequence[int | None]) -> str:
    at = [f"{step:,}" for step in steps if step is not None]
    return f"{len(at)} of {len(steps)}" + (f" (step {', '.join(at)})" if at else "")
