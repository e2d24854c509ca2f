"""Study `explosion` (figures 1 and 4): do the logits of MHSA explode where those of LS-attention do not, and
is it for the reason that the paper gives?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_intervals
from longshort.studies.comparison import (
    Trained,
    arm_table,
    log_ratio,
    plan_arms,
    predictions,
    rate_text,
    split_by_depth,
    sweep_table,
    trained_arms,
    without_doubles,
)
from longshort.studies.explosion_claims import (
    DIVERGENCE,
    EXPLANATIONS,
    MECHANISM,
    PERMUTED,
    RATIO,
    Divergences,
    judge_divergence,
    judge_mechanism,
    judge_ratio,
)
from longshort.studies.language import Arm, Setting, language_trial, model_config
from longshort.studies.language_run import LanguageStudy
from longshort.studies.settings import DEEP_LS, HYBRID, LS, MHSA, PAPER_SMALL, tiny, with_model, with_train
from longshort.studies.study import Findings, Plan, Results, Scale, Trial

INTERLEAVED = with_train(MHSA, "MHSA, interleaved text", token_order="interleaved")
LS_PERMUTED = with_train(LS, "LS, permuted text", token_order="permuted")
LS_INTERLEAVED = with_train(LS, "LS, interleaved text", token_order="interleaved")
PRECISIONS = tuple(
    with_model(arm, f"{arm.name}, {precision}", attention_precision=precision)
    for precision in ("fp32", "bf16-flash")
    for arm in (MHSA, LS)
)


@dataclass(frozen=True)
class _Scale:
    setting: Setting
    seeds: int
    controls: Sequence[Arm] = ()
    stress_rate: float = 1e-2
    depths: Sequence[int] = ()
    lengths: Sequence[int] = ()
    precisions: Sequence[str] = ()
    map_rates: Sequence[float] = ()


_SCALES: Mapping[Scale, _Scale] = {
    "smoke": _Scale(tiny(64, batch=2, steps=12), seeds=2),
    "laptop": _Scale(tiny(512, batch=4, steps=2000), seeds=3),
    "overnight": _Scale(
        tiny(512, batch=4, steps=4000),
        seeds=5,
        controls=(
            INTERLEAVED, LS_PERMUTED, LS_INTERLEAVED, *PRECISIONS, DEEP_LS, HYBRID,
        ),
        stress_rate=3e-2,
        depths=(2, 4),
        lengths=(512, 2048),
        precisions=("bf16", "bf16-flash"),
        map_rates=(3e-3, 1e-2, 3e-2),
    ),
    "paper": _Scale(
        PAPER_SMALL, seeds=3, controls=(INTERLEAVED, LS_PERMUTED, LS_INTERLEAVED), stress_rate=6e-3
    ),
}  # fmt: skip


class Explosion(LanguageStudy):
    """MHSA against LS-attention, and the arms and texts that test the paper's explanation."""

    name = "explosion"
    title = "Logit explosion and divergence (figures 1 and 4)"
    claims = (DIVERGENCE, RATIO, MECHANISM)

    def default_seeds(self, scale: Scale) -> int:
        return _SCALES[scale].seeds

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = _SCALES[scale]
        main = plan_arms(chosen.setting, (MHSA, LS), seeds, results)
        rest = plan_arms(chosen.setting, _other_arms(chosen), seeds, results)
        trials = [*main.trials, *_stress_trials(chosen, seeds), *rest.trials, *_map_trials(chosen, seeds[:3])]
        return Plan(without_doubles(trials), main.later_work + rest.later_work)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = _SCALES[scale]
        arms = trained_arms(chosen.setting, (MHSA, LS, *_other_arms(chosen)), seeds, results)
        diverged = _divergences(chosen, seeds, results)
        verdicts = [judge_divergence(diverged), judge_ratio(arms), judge_mechanism(arms)]
        return Findings(
            verdicts, [*_sections(chosen, arms, folder), _divergence_section(diverged)], predictions(arms)
        )


def _other_arms(chosen: _Scale) -> tuple[Arm, ...]:
    return (PERMUTED, *EXPLANATIONS, *chosen.controls)


def _stress_trials(chosen: _Scale, seeds: Sequence[int]) -> list[Trial]:
    return [
        language_trial(chosen.setting, arm, chosen.stress_rate, seed) for arm in (MHSA, LS) for seed in seeds
    ]


def _map_settings(chosen: _Scale) -> dict[str, tuple[Setting, float]]:
    """Learning rate × length × precision × depth, at equal tokens a step."""
    found = {}
    tokens = chosen.setting.train["batch_size"] * chosen.setting.train["sequence_length"]
    for depth in chosen.depths:
        for length in chosen.lengths:
            for precision in chosen.precisions:
                for rate in chosen.map_rates:
                    train = {
                        **chosen.setting.train,
                        "sequence_length": length,
                        "batch_size": max(1, tokens // length),
                    }
                    model = {
                        **chosen.setting.model,
                        "num_hidden_layers": depth,
                        "attention_precision": precision,
                    }
                    name = f"{depth} layers, n = {length}, {precision}, rate {rate_text(rate)}"
                    found[name] = (replace(chosen.setting, model=model, train=train), rate)
    return found


def _map_trials(chosen: _Scale, seeds: Sequence[int]) -> list[Trial]:
    return [
        language_trial(setting, arm, rate, seed)
        for setting, rate in _map_settings(chosen).values()
        for arm in (MHSA, LS)
        for seed in seeds
    ]


def _divergences(chosen: _Scale, seeds: Sequence[int], results: Results) -> Divergences:
    settings = {
        f"rate {rate_text(rate)}": (chosen.setting, rate, seeds)
        for rate in sorted(
            {trial.settings["train"]["learning_rate"] for trial in _all_rates(chosen, seeds, results)}
        )
    }
    settings |= {name: (*at, seeds[:3]) for name, at in _map_settings(chosen).items()}
    found: dict[str, dict[str, list[int | None]]] = {}
    for name, (setting, rate, at) in settings.items():
        rows: dict[str, list[int | None]] = {}
        for arm in (MHSA, LS):
            known = [results.get(language_trial(setting, arm, rate, seed).key) for seed in at]
            rows[arm.name] = [result["diverged_at"] for result in known if result is not None]
        if all(len(row) == len(at) for row in rows.values()):
            found[name] = rows
    return found


def _all_rates(chosen: _Scale, seeds: Sequence[int], results: Results) -> list[Trial]:
    plan = plan_arms(chosen.setting, (MHSA, LS), seeds[:1], results)
    return [*plan.trials, *_stress_trials(chosen, seeds[:1])]


def _sections(chosen: _Scale, arms: Mapping[str, Trained], folder: Path) -> list[Section]:
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
                        draw_curves(_main_panels(main), folder / "explosion.png"),
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
        )
    if len(tests) > 1:
        ratios: list[tuple[str, Interval]] = [
            (name, log_ratio(arm, arms[MHSA.name], "max_logit").exp())
            for name, arm in tests.items()
            if name != MHSA.name
        ]
        panels = [
            Panel(
                "Training loss", "step", "nats per token",
                {n: a.curves("loss_curve") for n, a in tests.items()},
            ),
            Panel(
                "Largest logit", "step", "largest |scale · q·k|",
                {n: a.curves("max_logit") for n, a in tests.items()},
            ),
        ]  # fmt: skip
        sections.append(
            Section(
                "Why do they grow?",
                [("RoPE, ALiBi and a short convolution on q, k and v give full attention a sense of what "
                    "is near; permuted text has as many dependencies, none of them local. Losses of permuted "
                    "and interleaved text do not compare with the others. RoPE and ALiBi have no position "
                    "table, so fewer "
                    "parameters; all weights that two arms share start alike.")],
                table=arm_table(tests),
                figures=[
                    Figure(draw_curves(panels, folder / "mechanism.png"), "As above."),
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
    if arms:
        sections.append(
            Section("Learning rates", ["The best rate of each arm is marked."], table=sweep_table(arms))
        )
    return sections


def _main_panels(main: Mapping[str, Trained]) -> list[Panel]:
    def both(name: str) -> dict[str, Any]:
        return {arm: trained.curves(name) for arm, trained in main.items()}

    return [
        Panel("Training loss", "step", "nats per token", both("loss_curve")),
        Panel("Largest logit, all visible pairs", "step", "largest |scale · q·k|", both("max_logit")),
        Panel("Largest logit inside the window", "step", "largest |scale · q·k|", both("max_logit_in_band")),
        Panel("Row range (max − min of a query)", "step", "logits", both("row_range")),
    ]


def _head_panels(main: Mapping[str, Trained]) -> list[Panel]:
    """Per arm the largest logit of each layer and kind of head, a line per seed and their mean."""
    panels = []
    for name, arm in main.items():
        lines: dict[str, list[Any]] = {}
        for layer, layout in enumerate(model_config(arm.model, arm.training).head_layouts()):
            for kind, heads in (("global", layout.global_heads), ("local", layout.local_heads)):
                if heads:
                    lines[f"layer {layer}, {kind}"] = [
                        [(step, _largest(rows[layer], heads)) for step, rows in result["max_logit_by_head"]]
                        for result in arm.results["best"].values()
                    ]
        panels.append(Panel(f"{name}, by layer and kind of head", "step", "largest |scale · q·k|", lines))
    return panels


def _largest(values: Sequence[float | None], heads: Sequence[int]) -> float | None:
    chosen = [values[head] for head in heads]
    return None if None in chosen else max(value for value in chosen if value is not None)


def _divergence_section(diverged: Divergences) -> Section:
    rows = [
        (setting, *(_divergence_text(by_arm[arm.name]) for arm in (MHSA, LS)))
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
