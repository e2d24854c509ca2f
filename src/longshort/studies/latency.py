"""Study `latency` (last figure and table): how much faster does LS-attention read a prompt than MHSA?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longshort.bench.prefill import amdahl_bound, time_prefill
from longshort.model import prefill_flops, preset
from longshort.reporting.intervals import Interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import draw_points
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Study,
    Trial,
    Verdict,
    Workplace,
    not_measured,
)
from longshort.studies.language.arms import LS, MHSA

SAVING = Claim(
    "F6, T1",
    "On long sequences inference latency is up to 36 % below a state-of-the-art MHSA implementation of equal "
    "size.",
    "At no length up to 32,768 is the latency lower by 36 %.",
    "Time of a forward pass over the prompt, which fills a key-value cache and gives logits of the last "
    "position. The baselines are our MHSA, on the same kernels as LS, and transformers' GPT-2, on PyTorch's "
    "SDPA; all take turns in one process. Shown: at some n up to 32,768 the slowest pass of LS takes at most "
    "64 % of the fastest of both baselines, on this hardware. Partly: at some n it is faster than the "
    "fastest of both. Contradicted: at every n the fastest of LS is slower than the slowest of the faster "
    "baseline.",
    paper="up to 36 % lower",
)

GPT2 = "GPT-2 (SDPA)"
PROVIDERS = {LS.name: "ls", MHSA.name: "mhsa", GPT2: "gpt2"}
"""Models of the study, and their names as providers of `longshort bench prefill`."""


@dataclass(frozen=True)
class _Scale:
    preset: str
    lengths: Sequence[int]
    repeats: int
    seeds: int = 1


class Latency(Study):
    """A comparison of prefill by our LS model, our MHSA model and GPT-2 of equal size, weights untrained."""

    name = "latency"
    title = "Inference latency (last figure and table)"
    claims = (SAVING,)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale("tiny", (64, 128), 5),
        "laptop": _Scale("paper-base", (512, 2048, 8192), 5),
        "overnight": _Scale("paper-base", (512, 1024, 2048, 4096, 8192, 16_384, 32_768), 5),
        "paper": _Scale("paper-base", (512, 1024, 2048, 4096, 8192, 16_384, 32_768), 20),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        settings = {"pass": "prompt, with cache", "preset": chosen.preset, "repeats": chosen.repeats}
        return Plan(
            [
                Trial(
                    f"n = {length}", 0, {**settings, "length": length},
                    work=length / 60 * (chosen.repeats + 1) if chosen.preset != "tiny" else 1.0,
                )
                for length in chosen.lengths
            ]
        )  # fmt: skip

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        settings, device = trial.settings, workplace.torch_device
        length, shape = settings["length"], settings["preset"]
        times = time_prefill(
            shape,
            [length],
            tuple(PROVIDERS.values()),
            settings["repeats"],
            device.type,
            workplace.report_progress,
        )[length]
        where = device.type if device.type != "cpu" else f"cpu, {torch.get_num_threads()} threads"
        by_model = {name: times[provider] for name, provider in PROVIDERS.items()}
        return {
            "flops": {
                name: prefill_flops(
                    preset(shape, mhsa=name == MHSA.name, max_position_embeddings=length), length
                ).total
                for name in (LS.name, MHSA.name)
            },
            "pairs": {name: model.pairs for name, model in by_model.items()},
            "timing": {
                "seconds": {name: model.seconds for name, model in by_model.items()},
                "attention_seconds": {name: model.attention_seconds for name, model in by_model.items()},
                "device": where,
            },
        }

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        trials = self.plan(scale, seeds, results).trials
        rows = {
            trial.settings["length"]: results[trial.key]
            for trial in trials
            if results.get(trial.key, {}).get("timing")
        }
        if len(rows) < len(trials):
            return Findings([not_measured(SAVING)], [])
        seconds = {length: result["timing"]["seconds"] for length, result in rows.items()}
        texts = [f"n = {n:,}: {_saving(times):.0%}" for n, times in seconds.items()]
        evidence = (
            f"Medians of LS lower than those of the faster baseline by: {', '.join(texts)}. The paper: up to "
            "36 %."
        )
        longest = max(seconds)
        saving = _saving(seconds[longest])
        here = f"{abs(saving):.0%} {'lower' if saving >= 0 else 'higher'} for a prompt of {longest:,}"
        verdict = Verdict(SAVING, saving_outcome(seconds), evidence, here=here)
        chosen = self.scales[scale]
        section = _section(chosen.preset, rows, folder)
        return Findings([verdict], [section], tested=f"{chosen.preset}, n = {longest:,}")


def saving_outcome(seconds: Mapping[int, Mapping[str, Sequence[float]]]) -> Outcome:
    """Apply the rule of the claim to the times of all passes, by length and model."""
    ratios = {n: max(times[LS.name]) / min(map(min, _baselines(times))) for n, times in seconds.items()}
    if any(ratio <= 0.64 for n, ratio in ratios.items() if n <= 32_768):
        return Outcome.SHOWN
    if any(ratio < 1 for ratio in ratios.values()):
        return Outcome.PARTLY
    is_slower = all(min(times[LS.name]) > min(map(max, _baselines(times))) for times in seconds.values())
    return Outcome.CONTRADICTED if is_slower else Outcome.NOT_SHOWN


def _baselines(times: Mapping[str, Sequence[float]]) -> list[Sequence[float]]:
    return [values for name, values in times.items() if name != LS.name]


def _saving(times: Mapping[str, Sequence[float]], baseline: str | None = None) -> float:
    """Return the share by which the median of LS is below that of a baseline; None: of the faster one."""
    others = _baselines(times) if baseline is None else [times[baseline]]
    return 1 - median(times[LS.name]) / min(map(median, others))


def _allowed(result: Mapping[str, Any], baseline: str) -> float:
    """Return the saving against a baseline that Amdahl's law allows."""
    total, attention = (median(result["timing"][key][baseline]) for key in ("seconds", "attention_seconds"))
    return 1 - amdahl_bound(total, attention, result["pairs"][LS.name], result["pairs"][baseline]) / total


def _section(preset_name: str, rows: Mapping[int, Mapping[str, Any]], folder: Path) -> Section:
    baselines = [name for name in PROVIDERS if name != LS.name]
    header = ["n", *(f"{name} (s)" for name in PROVIDERS)]
    for name in baselines:
        header += [f"lower than {name}", "allowed"]
    cells = []
    lines: dict[str, list[tuple[float, Interval]]] = {name: [] for name in PROVIDERS}
    for length, result in rows.items():
        times = result["timing"]["seconds"]
        row = [f"{length:,}", *(number(median(times[name])) for name in PROVIDERS)]
        for name in baselines:
            row += [f"{_saving(times, name):.0%}", f"{_allowed(result, name):.0%}"]
        cells.append((*row, f"{1 - result['flops'][LS.name] / result['flops'][MHSA.name]:.0%}"))
        for name, line in lines.items():
            line.append((float(length), _spread(times[name])))
    file = draw_points({"Prefill": lines}, folder / "latency.png", "prompt (tokens)", "seconds")
    text = (
        f"The preset {preset_name} with untrained weights, fp32, batch 1, on "
        f"{next(iter(rows.values()))['timing']['device']}; the models take turns, but other trials may run "
        "beside. Allowed: what Amdahl's law allows, the baseline's time less the attention that LS avoids, "
        "at the baseline's own rate. The paper saw up to 36 % on its GPU."
    )
    table = Table((*header, "FLOPs lower by"), cells)
    return Section(
        "Time to read a prompt", [text], table=table, figures=[Figure(file, "Medians, with the range.")]
    )


def _spread(seconds: Sequence[float]) -> Interval:
    return Interval(median(seconds), min(seconds), max(seconds), len(seconds))
