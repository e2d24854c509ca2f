"""Study `allocation` (beyond the paper): which heads of a trained model should stay global? Rankings of heads
against the exhaustive optimum."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import rankdata

from longshort.data import DataFolder, validation_windows
from longshort.model import LongShortConfig, LongShortForCausalLM
from longshort.reporting.intervals import confidence_interval, prediction_interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves
from longshort.studies.framework.comparison import difference_text, holm, judge_above, judge_below, mean_text
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Trial,
    Verdict,
    Workplace,
    not_measured,
)
from longshort.studies.language.arms import MHSA, Setting, Variant, model_config, steady
from longshort.studies.language.equal_progress import BEGUN
from longshort.studies.language.trial import LanguageStudy, data_folder, trained_run
from longshort.training.trained import open_trained

TOLERANCE = 0.02
"""A regret below this, in nats per byte, is called small."""

CORRELATION = 0.5
"""A rank correlation above this is called predictive."""

_RULE = (
    "A model with all heads global is trained; then every layout in which each head is global or local is "
    "measured on the same validation windows, without training. The regret of a choice is its loss minus "
    "that of the best layout with as many global heads. 95 % interval over seeds of the mean regret over all "
    f"numbers of global heads but none and all. Shown: upper end below {TOLERANCE} nats per byte. "
    f"Contradicted: lower end above {TOLERANCE}. Otherwise not shown. Open while a trained model's loss is "
    f"above {BEGUN}."
)
ONE_AT_A_TIME = Claim(
    "allocation: one head at a time",
    "Heads can be chosen one by one: those whose loss rises most when they alone are made local should be "
    "global.",
    f"Such a choice costs {TOLERANCE} nats per byte more than the best layout of its size, or more.",
    _RULE,
)
GREEDY = Claim(
    "allocation: greedy",
    "Heads can be chosen greedily: from all global heads, the one that costs least is made local, again and "
    "again.",
    ONE_AT_A_TIME.falsifier,
    _RULE,
)
REPAIR = Claim(
    "allocation: repair",
    "The order of layouts before any training predicts their order after a short one.",
    f"After the repair the order is another: its rank correlation is {CORRELATION} or less.",
    "Layouts of equal numbers of global heads are trained for a few steps each, from the same weights and on "
    "the same batches: the best, the choices of both rankings, and random ones. Spearman's rank correlation "
    "of the losses before and after, its mean over the numbers of global heads; 95 % interval over seeds. "
    f"Shown: lower end above {CORRELATION}. Contradicted: upper end below {CORRELATION}. Otherwise not "
    f"shown. Open while a trained model's loss is above {BEGUN}.",
)

Losses = Sequence[float]
"""Losses of all layouts of a model: entry L is that of the layout whose global heads are the bits of L."""


def num_heads(losses: Losses) -> int:
    """Return the number of heads whose layouts were measured."""
    return (len(losses) - 1).bit_length()


def optimal_layouts(losses: Losses) -> list[int]:
    """Find the layout of the lowest loss for each number of global heads, 0 to all."""
    by_count: list[list[int]] = [[] for _ in range(num_heads(losses) + 1)]
    for layout in range(len(losses)):
        by_count[layout.bit_count()].append(layout)
    return [min(layouts, key=losses.__getitem__) for layouts in by_count]


def one_at_a_time_layouts(losses: Losses) -> list[int]:
    """Choose a layout for each number of global heads, 0 to all: the heads whose loss, when they alone are
    made local, is the highest."""
    every = len(losses) - 1
    heads = sorted(range(num_heads(losses)), key=lambda head: -losses[every ^ 1 << head])
    return [sum(1 << head for head in heads[:count]) for count in range(len(heads) + 1)]


def greedy_layouts(losses: Losses) -> list[int]:
    """Choose a layout for each number of global heads, 0 to all: from all global heads on, the head that
    costs least is made local."""
    chosen = [len(losses) - 1]
    while chosen[-1]:
        layout = chosen[-1]
        smaller = [layout ^ 1 << head for head in range(num_heads(losses)) if layout >> head & 1]
        chosen.append(min(smaller, key=losses.__getitem__))
    return chosen[::-1]


def regrets(losses: Losses, layouts: Sequence[int]) -> list[float]:
    """Compute the losses of layouts, one for each number of global heads, above those of the best ones."""
    return [losses[own] - losses[best] for own, best in zip(layouts, optimal_layouts(losses), strict=True)]


def mean_regret(losses: Losses, layouts: Sequence[int]) -> float:
    """Compute the mean regret over the numbers of global heads that leave a choice: neither none nor all."""
    return fmean(regrets(losses, layouts)[1:-1])


OPTIMUM = "optimum"
CHOICES: Mapping[str, Callable[[Losses], list[int]]] = {
    OPTIMUM: optimal_layouts,
    "one head at a time": one_at_a_time_layouts,
    "greedy": greedy_layouts,
}
"""How layouts are chosen: exhaustively, and by rankings that need few measurements."""

RANKINGS = tuple(name for name in CHOICES if name != OPTIMUM)


def sampled_layouts(losses: Losses, count: int, size: int, seed: int) -> list[int]:
    """Choose `size` layouts of `count` global heads: the best, those of both rankings, then random ones."""
    heads = num_heads(losses)
    chosen = [choose(losses)[count] for choose in CHOICES.values()]
    others = [layout for layout in range(1 << heads) if layout.bit_count() == count]
    random.Random(f"{seed} {count}").shuffle(others)
    return list(dict.fromkeys([*chosen, *others]))[:size]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation; None if one side has no order."""
    ranks = [rankdata(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = math.prod(float((rank @ rank) ** 0.5) for rank in centred)
    return float(centred[0] @ centred[1]) / norm if norm else None


def windows_of(layout: int, config: LongShortConfig, window: int) -> list[list[int | None]]:
    """Return the windows of each layer's heads; heads are counted layer by layer."""
    heads = config.num_attention_heads
    return [
        [None if layout >> layer * heads + head & 1 else window for head in range(heads)]
        for layer in range(config.num_hidden_layers)
    ]


@torch.no_grad()
def measure_layouts(run: Path, windows: int, workplace: Workplace) -> dict[str, Any]:
    """Measure the losses of every layout of a trained model on the first `windows` validation windows.

    Returns:
        "losses", and the tokens that were read for them, "tokens".
    """
    trained = open_trained(run, workplace.torch_device)
    length, window = trained.config.training.sequence_length, trained.config.band
    assert length is not None and window is not None
    batch = validation_windows(DataFolder.open(data_folder(workplace)).validation, length, windows)
    inputs, labels = (part.to(workplace.torch_device).split(8) for part in (batch.input_ids, batch.labels))
    fields = {**trained.model.config.to_dict(), "num_global_heads": None, "local_window": None}
    heads = trained.model.config.num_hidden_layers * trained.model.config.num_attention_heads
    losses = []
    for layout in range(1 << heads):
        layouts = windows_of(layout, trained.model.config, window)
        model = LongShortForCausalLM(LongShortConfig.from_dict({**fields, "layouts": layouts}))
        model.load_state_dict(trained.model.state_dict())
        model.to(workplace.torch_device).eval()  # pyright: ignore[reportArgumentType]
        parts = [
            model(part, shift_labels=targets, use_cache=False).loss.item() * len(part)
            for part, targets in zip(inputs, labels, strict=True)
        ]
        losses.append(math.fsum(parts) / windows)
        workplace.report_progress(0.5 + 0.5 * (layout + 1) / (1 << heads))
    return {"losses": losses, "tokens": len(losses) * windows * length}


@dataclass(frozen=True)
class _Scale:
    """The sizes of a scale.

    Attributes:
        setting: setting of the trained model, that of MHSA in the study `progress`.
        seeds: number of seeds.
        windows: validation windows on which every layout is measured.
        repair_steps: steps of training of the sampled layouts.
        counts: numbers of global heads of the sampled layouts.
        sample: sampled layouts of each of these numbers, at least 3, for the best and the rankings' choices.
    """

    setting: Setting
    seeds: int
    windows: int = 16
    repair_steps: int = 200
    counts: Sequence[int] = (1, 2, 4)
    sample: int = 6

    def trained(self, seed: int) -> Trial:
        """Make the trial that trains the model and measures its layouts."""
        trial = self.setting.trial(MHSA, self.setting.rates[0], seed)
        settings = {**trial.settings, "measure": {"layouts": {"windows": self.windows}}}
        return Trial("all layouts", seed, settings, trial.work)

    @property
    def config(self) -> LongShortConfig:
        settings = self.trained(0).settings
        return model_config(settings["model"], settings["train"])

    def repair(self, layout: int, seed: int) -> Trial:
        """Make the trial that trains a layout from the weights of the trained model."""
        trained, steps, config = self.trained(seed).settings, self.repair_steps, self.config
        train = {name: trained["train"][name] for name in ("sequence_length", "batch_size")} | {
            "steps": steps,
            "warmup_steps": steps // 10,
            "schedule": "wsd",
            "decay_steps": steps // 2,
            "validation_windows": self.windows,
            "evaluate_every": steps,
            "monitor_every": steps,
        }
        assert isinstance(config.local_window, int)
        model = {**trained["model"], "layouts": windows_of(layout, config, config.local_window)}
        name = f"repair of {_heads_text(layout, config)}"
        trial = Setting(model, train, "").trial(Variant(name), self.setting.rates[0], _NEW_BATCHES + seed)
        start = {part: trained[part] for part in ("model", "train")}
        return Trial(name, seed, {**trial.settings, "start": start}, trial.work)

    def repairs(self, seed: int, losses: Losses) -> dict[int, dict[int, Trial]]:
        """Make the trials of the sampled layouts, by number of global heads and layout."""
        return {
            count: {
                layout: self.repair(layout, seed)
                for layout in sampled_layouts(losses, count, self.sample, seed)
            }
            for count in self.counts
        }


_NEW_BATCHES = 1000  # added to the seed, for batches that the trained model has not seen


class Allocation(LanguageStudy):
    """All layouts of a trained model, and the rankings of its heads that are cheaper to measure. Models
    of the scale `paper` have too many layouts."""

    name = "allocation"
    title = "Which heads stay global (beyond the paper)"
    claims = (ONE_AT_A_TIME, GREEDY, REPAIR)
    scales: Mapping[Scale, _Scale] = {
        "smoke": _Scale(steady(64, 128, 20), 2, windows=2, repair_steps=2, counts=(2,), sample=3),
        "laptop": _Scale(steady(512, 4096, 4000), 3, sample=5),
        "overnight": _Scale(steady(1024, 8192, 10_000), 3),
    }

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = self.scales[scale]
        trials = [chosen.trained(seed) for seed in seeds]
        later_work = 0.0
        for seed in seeds:
            losses = _losses(results, chosen, seed)
            if losses is not None:
                repairs = chosen.repairs(seed, losses).values()
                trials += [trial for by_layout in repairs for trial in by_layout.values()]
            elif chosen.trained(seed).key not in results:
                later_work += chosen.repair(1, seed).work * chosen.sample * len(chosen.counts)
        return Plan(trials, later_work)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        layouts = trial.settings.get("measure", {}).get("layouts")
        if layouts is None:
            return super().run(trial, workplace)
        with trained_run(trial.settings, workplace) as run:
            return measure_layouts(run, layouts["windows"], workplace)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = self.scales[scale]
        if any(chosen.trained(seed).key not in results for seed in seeds):
            return Findings([not_measured(claim) for claim in self.claims], [])
        losses = {seed: _losses(results, chosen, seed) for seed in seeds}
        repaired = [
            Repaired.of(chosen.repairs(seed, found), found, results)
            for seed, found in losses.items() if found is not None
        ]  # fmt: skip
        known = [found for found in losses.values() if found is not None]
        done = [repair for repair in repaired if repair is not None]
        is_repaired = len(done) == len(seeds)
        late = len(seeds) - sum(found[-1] <= BEGUN for found in known)
        if late:
            text = (
                f"{late} of {len(seeds)} models did not fall to {BEGUN} nats per byte, or have a layout "
                "whose loss is not finite."
            )
            verdicts = [Verdict(claim, Outcome.NOT_REACHED, text) for claim in self.claims]
        else:
            verdicts = [
                _judge_regret(claim, known, name)
                for claim, name in zip((ONE_AT_A_TIME, GREEDY), RANKINGS, strict=True)
            ]
            verdicts.append(_judge_repair(done) if is_repaired else not_measured(REPAIR))
        pending = sum(verdict.outcome is Outcome.NOT_MEASURED for verdict in verdicts)
        predictions = {
            name: {"regret": prediction_interval(mean_regret(found, CHOICES[name](found)) for found in known)}
            for name in RANKINGS
        }
        if is_repaired:
            predictions["repair"] = {
                "rank_correlation": prediction_interval(repair.correlation for repair in done)
            }
        sections = _sections(chosen, known, done, folder)
        return Findings(holm(verdicts, pending), sections, predictions, chosen.setting.extent(len(seeds)))


def _losses(results: Results, chosen: _Scale, seed: int) -> list[float] | None:
    """Return the losses of all layouts of a seed; None if they are not known, or one was not finite."""
    result = results.get(chosen.trained(seed).key)
    return None if result is None or None in result["losses"] else result["losses"]


@dataclass(frozen=True)
class Repaired:
    """The sampled layouts of one seed, their losses before and after the repair, and who chose them.

    Attributes:
        losses: (before, after) by number of global heads and layout; None where a loss was not finite.
        choices: the chosen layouts, by ranking and number of global heads; "optimum" is the best before.
    """

    losses: Mapping[int, Mapping[int, tuple[float, float | None]]]
    choices: Mapping[str, Sequence[int]]

    @classmethod
    def of(
        cls, trials: Mapping[int, Mapping[int, Trial]], before: Losses, results: Results
    ) -> Repaired | None:
        """Collect the results of a seed; None until all are there."""
        if any(trial.key not in results for some in trials.values() for trial in some.values()):
            return None
        losses = {
            count: {
                layout: (before[layout], results[trial.key]["validation_loss"])
                for layout, trial in some.items()
            }
            for count, some in trials.items()
        }
        return cls(losses, {name: choose(before) for name, choose in CHOICES.items()})

    @property
    def correlation(self) -> float | None:
        """Compute the mean rank correlation over the numbers of global heads; None if one is not known."""
        found = []
        for pairs in self.losses.values():
            before, after = zip(*pairs.values(), strict=True)
            found.append(None if None in after else rank_correlation(before, after))
        return None if None in found else fmean(found)

    def regret(self, ranking: str) -> float | None:
        """Compute the mean loss of a ranking's choices after the repair, above that of the best before."""
        found = []
        for count, pairs in self.losses.items():
            own, best = (pairs[self.choices[name][count]][1] for name in (ranking, OPTIMUM))
            found.append(None if own is None or best is None else own - best)
        return None if None in found else fmean(found)


def _judge_regret(claim: Claim, known: Sequence[Losses], ranking: str) -> Verdict:
    choose = CHOICES[ranking]
    regret = confidence_interval(mean_regret(losses, choose(losses)) for losses in known)
    by_count = zip(*(regrets(losses, choose(losses))[1:-1] for losses in known), strict=True)
    texts = (f"{fmean(values):.3f} with {count}" for count, values in enumerate(by_count, start=1))
    evidence = (
        f"Mean regret {difference_text(regret)} nats per byte; by number of global heads {', '.join(texts)}. "
        f"Loss with all heads global {mean_text(losses[-1] for losses in known)}, "
        f"with none {mean_text(losses[0] for losses in known)}."
    )
    outcome = judge_below(regret, TOLERANCE, TOLERANCE)
    here = f"mean regret {difference_text(regret)} nats per byte"
    return Verdict(claim, outcome, evidence, regret.p_value(TOLERANCE), here)


def _judge_repair(done: Sequence[Repaired]) -> Verdict:
    correlation = confidence_interval(repair.correlation for repair in done)
    after = (
        f"{name} {difference_text(confidence_interval(repair.regret(name) for repair in done))}"
        for name in RANKINGS
    )
    possible = replace(correlation, high=min(correlation.high, 1.0))
    evidence = (
        f"Rank correlation {difference_text(possible)}. Loss after the repair minus that of the layouts "
        f"that were best before it, nats per byte: {', '.join(after)}."
    )
    outcome = judge_above(correlation, CORRELATION)
    here = f"rank correlation {difference_text(possible)}"
    return Verdict(REPAIR, outcome, evidence, correlation.p_value(CORRELATION), here)


def _heads_text(layout: int, config: LongShortConfig) -> str:
    """Name the global heads by layer: "0:1 1:0,3"."""
    heads = config.num_attention_heads
    by_layer = {
        layer: [str(head) for head in range(heads) if layout >> layer * heads + head & 1]
        for layer in range(config.num_hidden_layers)
    }
    return " ".join(f"{layer}:{','.join(some)}" for layer, some in by_layer.items() if some) or "none"


def _sections(
    chosen: _Scale, known: Sequence[Losses], done: Sequence[Repaired], folder: Path
) -> list[Section]:
    if not known:
        return []
    heads = num_heads(known[0])
    choices = {name: [choose(losses) for losses in known] for name, choose in CHOICES.items()}
    curves = {
        name: [
            [(count, losses[layout]) for count, layout in enumerate(layouts)]
            for losses, layouts in zip(known, by_seed, strict=True)
        ]
        for name, by_seed in choices.items()
    }
    curves["mean of all"] = [
        [(count, fmean(loss for layout, loss in enumerate(losses) if layout.bit_count() == count))
         for count in range(heads + 1)]
        for losses in known
    ]  # fmt: skip
    rows = [
        (
            f"{count}",
            _heads_text(choices[OPTIMUM][0][count], chosen.config),
            mean_text(losses[best[count]] for losses, best in zip(known, choices[OPTIMUM], strict=True)),
            *(
                difference_text(
                    confidence_interval(regrets(losses, CHOICES[name](losses))[count] for losses in known)
                )
                for name in RANKINGS
            ),
        )
        for count in range(heads + 1)
    ]
    training = chosen.setting.train
    tokens = len(known[0]) * chosen.windows * training["sequence_length"]
    share = tokens / (training["steps"] * training["batch_size"] * training["sequence_length"])
    loss_panel = Panel("All layouts, without training", "global heads", "nats per byte", curves)
    sections = [
        Section(
            "Layouts of a trained model",
            [
                chosen.setting.description,
                (
                    f"Each of the {len(known[0])} layouts was measured in a forward pass over "
                    f"{chosen.windows} windows: {number(tokens / 1e6)} million tokens in all, {share:.1%} of "
                    f"those of the training. One head at a time needs {heads + 1} of these passes, greedy "
                    f"{heads * (heads + 1) // 2 + 1}."
                ),
            ],
            table=Table(("global heads", "best, first seed (layer:heads)", "best loss",
                         *(f"regret, {name}" for name in RANKINGS)), rows),
            figures=[
                Figure(draw_curves([loss_panel], folder / "layouts.png"), "Losses by number of global heads.")
            ],
        )
    ]  # fmt: skip
    if done:
        pairs = {
            f"{count} global head{'s' if count > 1 else ''}": [
                sorted(repair.losses[count].values(), key=lambda pair: pair[0]) for repair in done
            ]
            for count in chosen.counts
        }
        panel = Panel("Before and after repair", "nats per byte before", "after", pairs)
        text = (
            f"{chosen.sample} layouts of each size were trained for {chosen.repair_steps} steps, at the rate "
            "of the training, which falls to 0 over the second half."
        )
        file = draw_curves([panel], folder / "repair.png")
        caption = "A line per seed through its layouts; it rises where the order stays."
        sections.append(Section("Repair", [text], figures=[Figure(file, caption)]))
    return sections
