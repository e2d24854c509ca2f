"""Study `latency` (last figure and table): how much faster is a forward pass of LS-attention than of MHSA?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longshort.model import LongShortForCausalLM, forward_flops, preset
from longshort.studies.figures import draw_points
from longshort.studies.settings import LS, MHSA
from longshort.studies.statistics import Interval
from longshort.studies.study import (
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
)
from longshort.training.report import Figure, Section, Table, number

SAVING = Claim(
    "F6, T1",
    "On long sequences inference latency is up to 36 % below a state-of-the-art MHSA implementation of equal "
    "size.",
    "At no length up to 32,768 is the latency lower by 36 %.",
    "Time of a forward pass over the prompt, logits of the last position; LS and MHSA take turns in one "
    "process. Shown: at some n up to 32,768 the slowest pass of LS takes at most 64 % of the fastest of "
    "MHSA, on this hardware. Partly: at some n it is faster than the fastest of MHSA. Contradicted: at every "
    "n the fastest of LS is slower than the slowest of MHSA.",
)


@dataclass(frozen=True)
class _Scale:
    preset: str
    lengths: Sequence[int]
    repeats: int


_SCALES: Mapping[Scale, _Scale] = {
    "smoke": _Scale("tiny", (64, 128), 5),
    "laptop": _Scale("paper-base", (512, 2048, 8192), 5),
    "overnight": _Scale("paper-base", (512, 1024, 2048, 4096, 8192, 16_384, 32_768), 5),
    "paper": _Scale("paper-base", (512, 1024, 2048, 4096, 8192, 16_384, 32_768), 20),
}


class Latency(Study):
    """Prefill of our LS model against our MHSA model, weights untrained."""

    name = "latency"
    title = "Inference latency (last figure and table)"
    claims = (SAVING,)

    def default_seeds(self, scale: Scale) -> int:
        return 1

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        return Plan(_trials(scale))

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        settings = trial.settings
        device = workplace.torch_device
        models = {
            name: _model(settings["preset"], settings["length"], name == MHSA.name, device)
            for name in (LS.name, MHSA.name)
        }
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 256, (1, settings["length"]), generator=generator).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(settings["repeats"] + 1):
            order = list(models.items())
            for name, model in order if turn % 2 else reversed(order):
                taken = _seconds(model, tokens)
                if turn > 0:  # the first is a warm-up
                    seconds[name].append(taken)
            workplace.report_progress((turn + 1) / (settings["repeats"] + 1))
        flops = {
            name: forward_flops(model.config, settings["length"]).total for name, model in models.items()
        }
        return {"flops": flops, "timing": {"seconds": seconds}}

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        trials = _trials(scale)
        rows = [(trial, results[trial.key]) for trial in trials if results.get(trial.key, {}).get("timing")]
        if len(rows) < len(trials):
            return Findings([Verdict(SAVING, Outcome.NOT_MEASURED, "The trials are not done.")], [])
        seconds = {trial.settings["length"]: result["timing"]["seconds"] for trial, result in rows}
        savings = {
            length: 1 - median(times[LS.name]) / median(times[MHSA.name]) for length, times in seconds.items()
        }
        texts = [f"n = {length:,}: {saving:.0%}" for length, saving in savings.items()]
        evidence = f"Medians of LS lower than MHSA's by: {', '.join(texts)}."
        verdict = Verdict(SAVING, saving_outcome(seconds), evidence)
        return Findings([verdict], [_section(scale, rows, savings, folder)])


def saving_outcome(seconds: Mapping[int, Mapping[str, Sequence[float]]]) -> Outcome:
    """By the rule of the claim, from the times of all passes by length and model."""
    ratios = {n: max(times[LS.name]) / min(times[MHSA.name]) for n, times in seconds.items()}
    if any(ratio <= 0.64 for n, ratio in ratios.items() if n <= 32_768):
        return Outcome.SHOWN
    if any(ratio < 1 for ratio in ratios.values()):
        return Outcome.PARTLY
    is_slower = all(min(times[LS.name]) > max(times[MHSA.name]) for times in seconds.values())
    return Outcome.CONTRADICTED if is_slower else Outcome.NOT_SHOWN


def _trials(scale: Scale) -> list[Trial]:
    chosen = _SCALES[scale]
    return [
        Trial(
            f"n = {length}",
            0,
            {"preset": chosen.preset, "length": length, "repeats": chosen.repeats},
            work=length / 100 * (chosen.repeats + 1) if chosen.preset != "tiny" else 1.0,
        )
        for length in chosen.lengths
    ]


def _model(name: str, length: int, mhsa: bool, device: torch.device) -> LongShortForCausalLM:
    config = preset(name, mhsa=mhsa, max_position_embeddings=length)
    return LongShortForCausalLM(config).to(device).eval()  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _seconds(model: LongShortForCausalLM, tokens: torch.Tensor) -> float:
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(tokens, use_cache=False, logits_to_keep=1)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _median(result: Mapping[str, Any], name: str) -> float:
    return median(result["timing"]["seconds"][name])


def _section(
    scale: Scale, rows: Sequence[tuple[Trial, Mapping[str, Any]]], savings: Mapping[int, float], folder: Path
) -> Section:
    table = Table(
        ("n", "LS (s)", "MHSA (s)", "lower by", "FLOPs lower by"),
        [
            (
                f"{trial.settings['length']:,}",
                number(_median(result, LS.name)),
                number(_median(result, MHSA.name)),
                f"{savings[trial.settings['length']]:.0%}",
                f"{1 - result['flops'][LS.name] / result['flops'][MHSA.name]:.0%}",
            )
            for trial, result in rows
        ],
    )
    lines = {
        name: [
            (float(trial.settings["length"]), _spread(result["timing"]["seconds"][name]))
            for trial, result in rows
        ]
        for name in (LS.name, MHSA.name)
    }
    file = draw_points({"Prefill": lines}, folder / "latency.png", "prompt (tokens)", "seconds")
    text = (
        f"The preset {_SCALES[scale].preset} with untrained weights, fp32, one thread, batch 1, without a "
        "key-value cache. Other trials may run beside; the two models take turns."
    )
    return Section(
        "Time of a forward pass", [text], table=table, figures=[Figure(file, "Medians, with the range.")]
    )


def _spread(seconds: Sequence[float]) -> Interval:
    return Interval(median(seconds), min(seconds), max(seconds), len(seconds))
