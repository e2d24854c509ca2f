"""Study `explosion` (figures 1 and 4): logits, losses and divergence of MHSA and LS-attention, by text,
positions and precision. It is a control without verdicts; the study `progress` judges the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_intervals
from longshort.studies.framework.comparison import Arms, measure_arms, rate_text, ratio
from longshort.studies.framework.study import Findings, Plan, Results, Scale, Trial, finished, unique
from longshort.studies.framework.sweep import Arm, plan_arms, sweep
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
    pair_sections,
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
    claims = ()
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(tiny(64, batch=2, steps=12), seeds=2),
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
        main = plan_arms(chosen.pair, seeds, results, ("best",))
        rest = plan_arms(chosen.others, seeds, results, ("best",))
        trials = [
            *main.trials, *chosen.stress_trials(seeds), *rest.trials, *chosen.map_trials(seeds[:3])
        ]  # fmt: skip
        return Plan(unique(trials), main.later_work + rest.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        arms = measure_arms([*chosen.pair, *chosen.others], seeds, results, ("best",))
        sections = [*_sections(chosen, arms, folder), _divergence_section(chosen, seeds, results)]
        return Findings((), sections, predictions(arms))


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
                        "Lines and axes as in the figure above.",
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
    return [*sections, *pair_sections(arms), sweep_section(arms)] if arms else sections


def _curves(arms: Arms, name: str) -> dict[str, Any]:
    return {arm: curves(results, name) for arm, results in arms.items()}


def _loss_panel(arms: Arms) -> Panel:
    return Panel("Training loss", "step", "nats per byte", _curves(arms, "loss_curve"))


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


def _divergence_section(chosen: _Scale, seeds: Sequence[int], results: Results) -> Section:
    swept = (rate for arm in chosen.pair for rate in sweep(arm, results, seeds[0]).losses)
    rates = sorted({chosen.stress_rate, *swept})
    settings = {f"rate {rate_text(rate)}": (chosen.setting, rate, seeds) for rate in rates}
    settings |= {name: (*at, seeds[:3]) for name, at in chosen.map.items()}
    rows = []
    for name, (setting, rate, some) in settings.items():
        trials = {
            variant.name: [setting.trial(variant, rate, seed) for seed in some] for variant in (MHSA, LS)
        }
        runs = finished(trials, results)
        if len(runs) == len(trials):
            rows.append((name, *map(_divergence_text, runs.values())))
    return Section(
        "Divergence",
        ["Runs that diverged, by setting, with the steps at which they did."],
        table=Table(("setting", MHSA.name, LS.name), rows),
    )


def _divergence_text(runs: Sequence[Mapping[str, Any]]) -> str:
    at = [f"{run['diverged_at']:,}" for run in runs if run["diverged_at"] is not None]
    return f"{len(at)} of {len(runs)}" + (f" (step {', '.join(at)})" if at else "")
