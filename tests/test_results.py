"""The numbers of README and of docs/reproduction.md against the committed results."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean
from unittest.mock import patch

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from longshort.reporting.intervals import confidence_interval, log_slopes, paired_difference, paired_log_ratio
from longshort.reporting.page import number
from longshort.stability.probe import STRIDE
from longshort.stability.rounding import AUDITED
from longshort.studies.allocation import (
    CHOICES,
    CORRELATION,
    RANKINGS,
    Repaired,
    mean_regret,
    optimal_layouts,
    regrets,
)
from longshort.studies.catalogue import STUDIES, judge_all
from longshort.studies.framework.claims import claims_markdown, read_claims
from longshort.studies.framework.comparison import difference, holm, interval_text, measure_arms, rate_text
from longshort.studies.framework.store import ResultsFile
from longshort.studies.framework.study import Outcome, finished
from longshort.studies.language.equal_progress import (
    BEGUN,
    LOSSES,
    at_loss,
    at_step,
    curve_of,
    is_stuck,
    log_cost_ratio_at_loss,
    log_ratio_at_loss,
    losses_reached,
    slope_at_loss,
    slopes_at_loss,
    step_at,
    values_at_loss,
)
from longshort.studies.language.trial import probe_series
from longshort.studies.progress.arms import LS_SIZES, MHSA_SIZES, SATURATION_SEEDS, SIZES
from longshort.studies.progress.chance import chance_slope
from longshort.studies.progress.design import copying_step
from longshort.studies.progress.logits import judge_mitigation
from longshort.studies.progress.needle import farthest_gain
from longshort.studies.progress.precision import error_over_seeds
from longshort.studies.progress.remedies import FIXED_LOSSES
from longshort.studies.progress.saturation import late_growth, saturation_sections

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "reproduction.md"]
REPRODUCTION = PAGES[1]
HEADS = 8
"""The heads of the model `tiny`, in both layers."""
PROBED_HEADS = 32 * HEADS
"""These heads in 32 windows."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_table_of_claims_is_what_the_command_prints(page):
    rows = read_claims([RESULTS / "overnight", RESULTS / "laptop"], list(STUDIES))
    assert claims_markdown(rows) in page.read_text()


@pytest.fixture(scope="module")
def overnight():
    """The sizes of `progress` at the scale `overnight`, and its committed results."""
    return SIZES["overnight"], ResultsFile(RESULTS / "overnight" / "progress").results


@pytest.fixture(scope="module")
def long_runs(overnight):
    """MHSA, LS and LS without a global head, on the seeds on which they are judged."""
    sizes, results = overnight
    return measure_arms(sizes.main, sizes.main_seeds(range(sizes.seeds), results), results, ("best",))


def text_of(page):
    """The text of a page with its lines joined."""
    return " ".join(page.read_text().split())


def with_ends(interval, form=".2f"):
    """The mean and the ends of an interval, with the minus sign that the page has."""
    mean, low, high = (format(value, form) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def ends(losses, log_ratio):
    """The smallest and the largest ratio at some losses, with their intervals."""
    ratios = sorted((log_ratio(loss).exp() for loss in losses), key=lambda interval: interval.mean)
    return f"{with_ends(ratios[0])} to {with_ends(ratios[-1])}"


def in_order(values):
    *first, last = values
    return f"{', '.join(first)} and {last}"


def million_bytes(train):
    """The bytes of a training's settings, in millions."""
    return 1e-6 * train["steps"] * train["batch_size"] * train["sequence_length"]


def row(name, cells):
    return f"| {' | '.join([name, *cells])} |".replace("|  |", "| |")


def test_ratios_at_equal_losses(long_runs):
    text, ls, mhsa = REPRODUCTION.read_text(), long_runs["LS"], long_runs["MHSA"]
    for name, quantity in (("largest logit", "max_logit"), ("row range", "row_range")):
        assert (
            row(
                name,
                (interval_text(log_ratio_at_loss(ls, mhsa, quantity, loss).exp()) for loss in LOSSES),
            )
            in text
        )
    for name, unit in (("tokens", "tokens"), ("FLOPs", "flops")):
        assert (
            row(name, (interval_text(log_cost_ratio_at_loss(ls, mhsa, unit, loss).exp()) for loss in LOSSES))
            in text
        )


def test_what_the_pages_say_of_the_pair(long_runs):
    readme, text = map(text_of, PAGES)
    ls, mhsa, none = (long_runs[name] for name in ("LS", "MHSA", "LS, no global head"))

    tokens = ends(LOSSES, lambda loss: log_cost_ratio_at_loss(ls, mhsa, "tokens", loss))
    logits = ends(LOSSES, lambda loss: log_ratio_at_loss(ls, mhsa, "max_logit", loss))
    assert f"the same losses with {tokens} of the tokens" in readme
    assert f"Its largest logit is {logits} times MHSA's" in readme
    for arm in (mhsa, none):
        change = difference(arm, ls, "constant_loss")
        assert f"by {with_ends(change)}" in readme
        assert f"by {with_ends(change, '.3f')}" in text
    peaks = sorted(round(max(run["probe"]["max_logit"])) for run in mhsa.results())
    assert f"their peak, {peaks[0]} to {peaks[-1]} by seed" in text
    claim = read_verdicts()["F1: ratio of logits"]
    assert f"p = {claim['p']:.2g} after the correction" in text


def test_needles_and_rounding_of_the_pair(overnight):
    text = text_of(REPRODUCTION)
    sizes, results = overnight
    last = range(sizes.seeds)[-sizes.other_seeds :]
    needles = finished(sizes.needle_trials(last), results)
    gains = {name: fmean(map(farthest_gain, runs)) for name, runs in needles.items()}
    assert (
        f"by {gains['LS']:.1f} nats per byte with LS, by {gains['MHSA']:.1f} with MHSA, and by nothing"
        in text
    )
    assert abs(gains["LS, no global head"]) < 0.05
    audits = finished(sizes.pair_audits(last), results)
    spreads = []
    for name in ("LS", "MHSA"):
        found = [error_over_seeds(audits[name], "bf16", matrix, "noise") for matrix in "qk"]
        noise = sorted(round(100 * error.mean) for error in found if error is not None)
        spreads.append(f"{noise[0]} to {noise[-1]} % with {name}")
        for precision, matrix in product(AUDITED[1:], "qk"):
            bias = error_over_seeds(audits[name], precision, matrix, "bias")
            assert bias is not None and bias.low < 0 < bias.high
    assert f"the noise is {' and '.join(spreads)}" in text


def read_verdicts():
    """The committed verdicts of `progress` at the scale `overnight`, by claim."""
    found = json.loads((RESULTS / "overnight" / "progress" / "findings.json").read_text())
    return {verdict["claim"]["id"]: verdict for verdict in found["verdicts"]}


def single_runs(name, results):
    """The row of an arm: where each seed begins to copy, its losses, and its largest logit."""
    steps = [copying_step(result) for result in results]
    copies = [None if step is None else 1e-6 * step * results[0]["tokens_per_step"] for step in steps]
    last = [
        dict(zip(result["probe"]["step"], result["probe"]["max_logit"], strict=True))[
            result["constant_until"]
        ]
        for result in results
    ]
    cells = [
        ", ".join("–" if value is None else f"{value:.0f}" for value in copies),
        ", ".join(f"{result['constant_loss']:.2f}" for result in results),
        ", ".join(f"{result['validation_loss']:.2f}" for result in results),
        ", ".join(number(value) for value in last),
    ]
    return row(name, cells)


def test_single_runs(long_runs):
    text = REPRODUCTION.read_text()
    for name, arm in long_runs.items():
        assert single_runs(name, arm.results()) in text


def test_other_remedies(overnight, long_runs):
    """A row per baseline and unit of cost: what LS spends to reach a loss; and a row of single runs."""
    readme, page = map(text_of, PAGES)
    text = page.split("## Other remedies")[1].split(" ## ")[0]
    sizes, results = overnight
    ls, arms = long_runs["LS"], sizes.remedy_arms(range(sizes.other_seeds))
    found = {
        name: baseline
        for arm, seeds in arms
        for name, baseline in measure_arms([arm], seeds, results, ("best",)).items()
    }
    for name, baseline in found.items():
        for unit, words in (("tokens", "tokens"), ("flops", "FLOPs")):
            costs = [log_cost_ratio_at_loss(ls, baseline, unit, loss).exp() for loss in FIXED_LOSSES]
            assert row(f"LS/{name}, {words}", map(interval_text, costs)) in text
        assert single_runs(name, baseline.results()) in text
    assert row("to a validation loss of", map(str, FIXED_LOSSES)) in text
    qk_norm = found["MHSA + QK-norm"]
    tokens, flops = (
        [log_cost_ratio_at_loss(ls, qk_norm, unit, loss).exp() for loss in FIXED_LOSSES]
        for unit in ("tokens", "flops")
    )
    assert tokens[0].high < 1 < tokens[1].low and tokens[2].low < 1 < tokens[2].high
    assert all(cost.high < 1 for cost in flops)
    above = difference(qk_norm, ls, "constant_loss")
    assert above.low < 0 < above.high
    assert f"QK-norm's less that of LS is {with_ends(above, '+.3f')} nats" in text
    logits = [log_ratio_at_loss(ls, qk_norm, "max_logit", loss).exp() for loss in FIXED_LOSSES[1:]]
    told = " and ".join(map(interval_text, logits))
    assert f"LS's largest logit is {told} times that of QK-norm" in text
    assert (
        f"To reach 1.7 nats per byte LS needs {with_ends(tokens[1])} times its tokens but "
        f"{with_ends(flops[1])} times its FLOPs, and LS's largest logit there is half as large"
    ) in readme
    assert 0.45 < logits[0].mean < 0.55
    claim = read_verdicts()["F5"]
    assert claim["outcome"] == "not shown at this scale" and "The claim is *not shown*:" in text
    fp32, mhsa = found["MHSA, fp32"], long_runs["MHSA"]
    tokens = sorted(log_cost_ratio_at_loss(fp32, mhsa, "tokens", loss).exp().mean for loss in LOSSES)
    logits = sorted(log_ratio_at_loss(fp32, mhsa, "max_logit", loss).exp().mean for loss in LOSSES)
    assert (
        f"from {LOSSES[0]} to {LOSSES[-1]} with {tokens[0]:.2f} to {tokens[-1]:.2f} times the tokens, and "
        f"its largest logit there is {logits[0]:.2f} to {logits[-1]:.2f} times as large"
    ) in text
    assert all(0.85 < ratio < 1.15 for ratio in (*tokens, *logits))


def test_without_weight_decay(overnight, long_runs, tmp_path):
    """The rows of the report: largest logits at equal steps, and their growth while the steps double."""
    text = text_of(REPRODUCTION).split("## Without weight decay")[1].split(" ## ")[0]
    sizes, results = overnight
    arms = measure_arms(sizes.saturation_arms, range(SATURATION_SEEDS), results, ("best",))
    (section,) = saturation_sections({**long_runs, **arms}, tmp_path)
    assert section.table is not None
    for name, *cells in section.table.rows:
        assert row(name, cells) in text
    (undecayed,), mhsa = arms.values(), long_runs["MHSA"]
    first = undecayed.results()[0]
    until = first["constant_until"]

    def million(steps):
        return f"{1e-6 * steps * first['tokens_per_step']:.0f}"

    marks = [million(share * until) for share in (0.25, 0.5, 0.75, 1)]
    assert row("largest logit after (million bytes)", ["seeds", *marks, "per doubling"]) in text
    assert f"on two seeds, for {million(undecayed.settings['train']['steps'])} million bytes" in text
    assert f"fitted from {marks[1]} to {marks[3]} million bytes" in text
    growth = late_growth(undecayed, until)
    assert growth.low < 1 < growth.high

    peaks, last, losses = [], [], []
    for arm in (undecayed, mhsa):
        runs = arm.results()[:SATURATION_SEEDS]
        curves = [
            {step: value for step, value in curve_of(run, "max_logit") if value is not None} for run in runs
        ]
        tops = [max((value, step) for step, value in curve.items()) for curve in curves]
        values = in_order(f"{value:.0f}" for value, _ in tops)
        peaks.append(f"{values}, after {in_order(million(step) for _, step in tops)}")
        last.append(in_order(f"{curve[until]:.0f}" for curve in curves))
        losses.append([f"{dict(map(tuple, run['validation_curve']))[until]:.2f}" for run in runs])
    assert (
        f"peaks at {peaks[0]} million bytes; with weight decay the same seeds peak at {peaks[1]}."
    ) in text
    assert f"After the peak it falls on both seeds, to {last[0]} after {marks[3]} million bytes" in text
    (same,) = set(losses[1])
    assert f"the loss is {in_order(losses[0])} without weight decay and {same} on both seeds with it" in text
    ratios = {loss: log_ratio_at_loss(undecayed, mhsa, "max_logit", loss).exp() for loss in LOSSES[:4]}
    assert f"it is {with_ends(ratios.pop(1.7))} times as large; at 2.2 to 2.0 two seeds" in text
    assert all(ratio.low < 1 < ratio.high for ratio in ratios.values())


def test_tokens_by_length(overnight):
    """A row per arm and loss: million bytes to the loss by length, geometric means over seeds."""
    sizes, results = overnight
    growth = {}
    for name, loss in product(("MHSA", "LS"), (BEGUN, 2.0)):
        tokens = []
        for arms in sizes.length_arms.values():
            runs = [results[arms[name].trial(3e-3, seed).key] for seed in range(sizes.other_seeds)]
            steps = [step for run in runs if (step := step_at(run, loss)) is not None]
            assert len(steps) == len(runs)
            tokens.append(1e-6 * runs[0]["tokens_per_step"] * geometric_mean(steps))
        assert row(f"{name} to {loss}", (f"{count:.1f}" for count in tokens)) in REPRODUCTION.read_text()
        growth[name, loss] = tokens[-1] / tokens[0]
    assert (
        f"at n = 2,048 {growth['MHSA', BEGUN]:.0f} times as many as at 256 to {BEGUN} nats per byte, and "
        f"{growth['MHSA', 2.0]:.0f} times to 2.0. LS needs {growth['LS', BEGUN]:.1f} and "
        f"{growth['LS', 2.0]:.1f} times as many."
    ) in text_of(REPRODUCTION)


@pytest.fixture(scope="module")
def by_length(overnight):
    """The results of MHSA and LS by length, and the losses that all of these runs reach."""
    sizes, results = overnight
    seeds = range(sizes.other_seeds)
    arms = {
        n: measure_arms(arms.values(), seeds, results, ("best",)) for n, arms in sizes.length_arms.items()
    }
    found = {name: {n: arms[n][f"{name}, n = {n}"] for n in arms} for name in ("MHSA", "LS")}
    return found, losses_reached(run for arm in found["MHSA"].values() for run in arm.results())


def slopes_of(by_length, name, quantity):
    found, losses = by_length
    return [slope_at_loss(found[name], quantity, loss) for loss in losses]


def test_growth_with_the_length(overnight, by_length):
    """A row per arm and loss: the row range by length, means over seeds, and its slope over log n."""
    text = text_of(REPRODUCTION).split("## Sequence length")[1].split(" ## ")[0]
    found, reached = by_length
    lengths = list(found["MHSA"])
    assert in_order(map(str, reached)) in text
    for name in ("MHSA", "LS"):
        for loss, slope in zip(reached, slopes_of(by_length, name, "row_range"), strict=True):
            ranges = [values_at_loss(arm, "row_range", loss).values() for arm in found[name].values()]
            cells = [f"{confidence_interval(values).mean:.0f}" for values in ranges]
            assert row(f"{name} at {loss}", [*cells, with_ends(slope, "+.2f")]) in text
    by_chance = chance_slope(lengths, PROBED_HEADS)
    assert f"independent normal logits has a slope of {by_chance:+.2f}" in text
    growth, logits = (slopes_of(by_length, "MHSA", quantity) for quantity in ("row_range", "max_logit"))
    assert [slope.low > by_chance for slope in growth] == [False, True, False]
    assert [slope.low > 0 for slope in growth] == [slope.low > 0 for slope in logits] == [False, True, False]
    assert all(
        slope.mean < by_chance and slope.low < 0 < slope.high
        for slope in slopes_of(by_length, "LS", "row_range")
    )
    assert f"largest logit has slopes of {in_order(with_ends(slope, '+.2f') for slope in logits)}" in text
    percentiles = in_order(with_ends(slope, "+.2f") for slope in slopes_of(by_length, "MHSA", "quantile"))
    assert (
        f"99.9th percentile of its logits, which their number alone does not move, has {percentiles}" in text
    )
    ranges, largest = (sorted(2**slope.mean for slope in slopes) for slopes in (growth, logits))
    assert (
        f"while n doubles, the row range grows by a factor of {ranges[0]:.2f} to {ranges[-1]:.2f}, the "
        f"largest logit by {largest[0]:.2f} to {largest[-1]:.2f}"
    ) in text
    whole = sorted((lengths[-1] / lengths[0]) ** slope.mean for slope in logits)
    told = f"{whole[0]:.1f} to {whole[-1]:.1f} times as large at n = {lengths[-1]:,} as at {lengths[0]}"
    assert f"MHSA's largest logit is {told} by the fitted slopes" in text_of(PAGES[0])

    runs = {(name, n): arm.results() for name, arms in found.items() for n, arm in arms.items()}
    assert all(run["diverged_at"] is None for each in runs.values() for run in each)
    spikes = {arm: sorted(run["spikes"] for run in each) for arm, each in runs.items()}
    assert spikes == {arm: [0, 0, 0] for arm in runs} | {("MHSA", 2048): [0, 1, 1]}
    assert "None of these runs diverged; two of MHSA's three at n = 2,048 had a spike each" in text
    most = in_order(f"{million_bytes(setting.train):.0f}" for setting in overnight[0].lengths)
    assert f"their limits, {most} million bytes, were not needed" in text
    assert all(step_at(run, 1.95) is not None for each in runs.values() for run in each)


def test_growth_looked_at_afterwards(by_length):
    """What chance gives is drawn: logits that are independent and normal."""
    text = text_of(REPRODUCTION).split("## Sequence length")[1].split(" ## ")[0]
    lengths = list(by_length[0]["MHSA"])
    generator = torch.Generator().manual_seed(0)

    def median_of_largest(n):
        """Draw each head's largest absolute logit in all windows together; take the median over heads."""
        count = PROBED_HEADS // HEADS * sum(range((n - 1) % STRIDE + 1, n + 1, STRIDE))
        drawn = torch.rand(4000, HEADS, generator=generator, dtype=torch.float64)
        return torch.special.ndtri((1 + drawn ** (1 / count)) / 2).quantile(0.5, 1).mean()

    def range_in_band(n):
        """Draw largest and smallest of the nearest 16 logits of each query; take the largest range."""
        ranges = []
        for _ in range(10):
            u, v = torch.rand(2, 20, n // STRIDE * PROBED_HEADS, generator=generator, dtype=torch.float64)
            largest = u ** (1 / 16)
            smallest = largest * (1 - v ** (1 / 15))
            ranges.append((torch.special.ndtri(largest) - torch.special.ndtri(smallest)).amax(1))
        return torch.cat(ranges).mean()

    def by_chance(draw):
        return log_slopes({n: {0: float(draw(n))} for n in lengths})[0]

    def slopes(name, quantity):
        return slopes_of(by_length, name, quantity)

    others = {
        name + part for name in ("max_logit", "quantile", "row_range") for part in ("_median", "_in_band")
    }
    growing = {name for name in others if all(one.low > 0 for one in slopes("MHSA", name))}
    assert growing == {"max_logit_median", "row_range_median", "row_range_in_band"}
    assert all(one.low < 0 < one.high for name in growing for one in slopes("LS", name))
    logits, ranges, in_band = (
        in_order(with_ends(one, "+.2f") for one in slopes("MHSA", name))
        for name in ("max_logit_median", "row_range_median", "row_range_in_band")
    )
    of_logits, of_ranges = by_chance(median_of_largest), chance_slope(lengths, PROBED_HEADS // HEADS)
    assert f"median of the largest logit has slopes of {logits}, that of the row range {ranges}" in text
    assert f"chance gives the first {of_logits:+.2f} and the second {of_ranges:+.2f}" in text
    assert f"nearest 16 keys the row range has slopes of {in_band}" in text
    of_band = by_chance(range_in_band)
    assert of_band is not None
    assert f"each interval lies above the {of_band:+.2f} that chance gives there" in text
    assert all(one.low > of_band for one in slopes("MHSA", "row_range_in_band"))


def test_logits_at_each_length(by_length):
    readme, page = map(text_of, PAGES)
    text = page.split("## Sequence length")[1].split(" ## ")[0]
    (found, reached), lengths = by_length, list(by_length[0]["MHSA"])
    mhsa, ls = found["MHSA"], found["LS"]
    ratios = {
        (n, loss): log_ratio_at_loss(ls[n], mhsa[n], "max_logit", loss) for n in lengths for loss in reached
    }
    means = sorted(ratio.exp().mean for ratio in ratios.values())
    assert all(ratio.high < 0 for ratio in ratios.values()) and len(ratios) == 12
    told = f"LS's largest logit is {means[0]:.2f} to {means[-1]:.2f} times MHSA's"
    assert told in text and f"At each length from {lengths[0]} to {lengths[-1]:,} {told}" in readme
    verdicts = read_verdicts()
    growing, each = verdicts["F3"], verdicts["F4: each length"]
    assert growing["outcome"] == each["outcome"] == "not shown at this scale"
    (alone,) = holm([judge_mitigation({n: {a.arm.name: a for a in (mhsa[n], ls[n])} for n in lengths})], 0)
    assert alone.outcome is Outcome.SHOWN
    assert f"would be *shown* (p = {alone.p:.3f})" in text
    assert f"not even *partly shown* holds (p = {each['p']:.2f})" in text
    sooner = interval_text(log_cost_ratio_at_loss(ls[256], mhsa[256], "tokens", 2.0).exp())
    assert f"slower one to 2.0: it needs {sooner} times the tokens" in text
    assert f"to a loss of 2.0 it needs {sooner} times the tokens" in readme


def test_rotary_positions(overnight):
    text = text_of(REPRODUCTION)
    sizes, results = overnight
    arms = sizes.position_arms(0)
    every = measure_arms(arms, range(sizes.other_seeds), results, ("best",))
    mhsa, ls, local = (every[arm.name] for arm in arms)
    reached = losses_reached([*ls.results(), *mhsa.results()])
    assert reached == [2.2, 2.1, 2.0, 1.7]

    logits = ends(reached, lambda loss: log_ratio_at_loss(ls, mhsa, "max_logit", loss))
    tokens = ends(reached, lambda loss: log_cost_ratio_at_loss(ls, mhsa, "tokens", loss))
    assert (
        f"LS with RoPE has {logits} times the largest logit of MHSA with RoPE, and needs {tokens} of the "
        "tokens"
    ) in text
    assert sizes.brief is not None
    until = sizes.brief.train["steps"] - sizes.brief.train["decay_steps"]
    assert f"losses after {1e-6 * until * mhsa.results()[0]['tokens_per_step']:.0f} million bytes" in text
    for name, arm in every.items():
        losses = [dict(map(tuple, result["validation_curve"]))[until] for result in arm.results()]
        assert row(name, (f"{loss:.2f}" for loss in losses)) in text
    begun = [f"{1e-6 * step * 8192:.1f}" for arm in (mhsa, ls) if (step := step_at(arm.results()[0], BEGUN))]
    assert "after {} million bytes and LS after {}, with".format(*begun) in text
    first = {name: arm.results()[0] for name, arm in every.items()}
    at_end = [f"{run['constant_loss']:.2f}" for run in first.values()]
    assert "MHSA with RoPE is at {} and LS with RoPE at {}".format(*at_end) in text
    last = first[local.arm.name]
    assert f"ends lowest of all: at {at_end[2]}, after the decay at {last['validation_loss']:.3f}" in text
    copies = [copying_step(run) for run in first.values()]
    assert copies[:2] == [None, None] and copies[2] is not None
    assert f"begins after {1e-6 * copies[2] * 8192:.0f} million bytes" in text
    peaks = [f"{max(run['probe']['max_logit']):.0f}" for run in first.values()]
    assert (
        "MHSA with RoPE has the largest logit, {}; LS with RoPE has {}, and LS with RoPE on its local heads "
        "alone {}.".format(*peaks)
    ) in text


@pytest.fixture(scope="module")
def mechanism(overnight):
    """The arms with heads of other sizes and with hidden keys."""
    sizes, results = overnight
    arms = measure_arms(sizes.mechanism_arms, range(sizes.other_seeds), results, ("best",))
    assert len(arms) == len(sizes.mechanism_arms)
    return arms


def test_why_logits_grow(overnight, mechanism):
    """A row per arm: means over seeds of the largest logit at equal losses, "–" if not all seeds reach it."""
    readme, page = map(text_of, PAGES)
    text = page.split("## Why the logits grow")[1].split(" ## ")[0]
    losses, reached = LOSSES[:3], list(LOSSES[:2])
    train = overnight[0].mechanism.train
    assert (
        f"train at n = {train['sequence_length']}, to a loss of {train['stop_at_loss']} or for "
        f"{million_bytes(train):.0f} million bytes"
    ) in text
    assert row("largest logit at a validation loss of", map(str, losses)) in text
    for name, arm in mechanism.items():
        known = losses_reached(arm.results(), losses)
        means = [confidence_interval(values_at_loss(arm, "max_logit", loss).values()).mean for loss in known]
        cells = [f"{mean:.0f}" for mean in means] + ["–"] * (len(losses) - len(known))
        assert row(name, cells) in text
    judged = [run for name, arm in mechanism.items() if "75%" not in name for run in arm.results()]
    assert losses_reached(judged, losses) == reached
    claim = read_verdicts()["mechanism"]
    assert claim["outcome"] == "not shown at this scale" and text.count("The claim is *not shown*.") == 1
    before, after = re.findall(r"p-value, ([0-9.]+), is ([0-9.]+) after", claim["evidence"])[0]
    assert (
        f"would be *contradicted* (p = {before}); after the correction for the study's claims it is not "
        f"(p = {after})"
    ) in text
    assert "Why logits grow is open." in readme


def test_logits_by_the_size_of_heads(mechanism):
    text = text_of(REPRODUCTION)
    shared = {dim: MHSA_SIZES[dim] for dim in LS_SIZES}

    def slopes(variants, quantity="max_logit"):
        by_size = {dim: mechanism[variant.name] for dim, variant in variants.items()}
        return [slopes_at_loss(by_size, quantity, loss) for loss in LOSSES[:3]]

    def intervals(by_loss):
        return [confidence_interval(by_seed.values()) for by_seed in by_loss]

    def told(by_loss):
        return in_order(f"{one.mean:+.2f}".replace("-", "−") for one in intervals(by_loss))

    every, median = slopes(MHSA_SIZES), slopes(MHSA_SIZES, "max_logit_median")
    assert f"log largest logit over log head_dim is {told(every)} at the three losses" in text
    assert [-0.01 < one.high < 0 for one in intervals(every)] == [True, False, False]
    assert all(one.high < 0 for one in intervals(every))
    assert f"The median over heads does not fall: its slopes are {told(median)}, with" in text
    assert all(one.low < 0 < one.high for one in intervals(median))
    mhsa, ls = slopes(shared), slopes(LS_SIZES)
    assert (
        f"over heads of {min(LS_SIZES)} to {max(LS_SIZES)} the slopes are {told(mhsa)} with MHSA, {told(ls)} "
        "with LS"
    ) in text
    assert [one.high < 0 for one in intervals(ls)] == [True, False, False]
    above = [paired_difference(*pair) for pair in zip(mhsa, ls, strict=True)]
    assert [one.low > 0 for one in above] == [True, False, False]


def test_logits_with_hidden_keys(mechanism):
    readme, text = map(text_of, PAGES)
    pairs = {name: (mechanism[f"{name}, 50% of keys hidden"], mechanism[name]) for name in ("MHSA", "LS")}

    def ratios(name, quantity):
        found = [log_ratio_at_loss(*pairs[name], quantity, loss).exp() for loss in LOSSES[:2]]
        return list(map(with_ends, found))

    def tokens(name):
        found = [log_cost_ratio_at_loss(*pairs[name], "tokens", loss).exp() for loss in LOSSES[:2]]
        return " and ".join(f"{one.mean:.1f}" for one in found)

    first, second = ratios("MHSA", "max_logit")
    assert f"largest logit at a loss of 2.2 is {first} times as large, and {second} times at 2.1" in text
    assert f"MHSA's largest logit is {second} to {first} times as large at equal loss" in readme
    assert f"LS's is {' and '.join(ratios('LS', 'max_logit'))} times as large" in text
    medians = " and ".join(ratios("MHSA", "max_logit_median"))
    assert f"The median over MHSA's heads is {medians} times as large" in text
    assert f"With half of its keys hidden MHSA needs {tokens('MHSA')} times as many tokens" in text
    assert f"LS too, which needs {tokens('LS')} times as many tokens" in text
    by_seed = (
        {seed: at_step(run, "max_logit", 1000) for seed, run in arm.by_rate["best"].items()}
        for arm in pairs["MHSA"]
    )
    early = with_ends(paired_log_ratio(*by_seed).exp())
    assert f"at step 1,000, its largest logit is {early} times" in text


@pytest.fixture(scope="module")
def laptop():
    """The sizes of `progress` at the scale `laptop`, and its committed results."""
    return SIZES["laptop"], ResultsFile(RESULTS / "laptop" / "progress").results


def test_short_runs(laptop):
    text = text_of(REPRODUCTION)
    sizes, results = laptop
    arms = measure_arms(sizes.main, range(sizes.seeds), results, ("best",))
    ls, mhsa = arms["LS"], arms["MHSA"]
    losses = [2.2, 2.1, 2.0]
    assert losses_reached([*ls.results(), *mhsa.results()]) == losses
    logits = in_order(f"{log_ratio_at_loss(ls, mhsa, 'max_logit', loss).exp().mean:.2f}" for loss in losses)
    tokens = in_order(f"{log_cost_ratio_at_loss(ls, mhsa, 'tokens', loss).exp().mean:.2f}" for loss in losses)
    assert f"LS's largest logit is {logits} times MHSA's, and it needs {tokens} of the tokens" in text
    assert all(copying_step(result) is None for arm in arms.values() for result in arm.results())


def test_short_runs_by_length(laptop):
    text = text_of(REPRODUCTION)
    sizes, results = laptop
    by_length = {
        n: measure_arms(arms.values(), range(sizes.other_seeds), results, ("best",))
        for n, arms in sizes.length_arms.items()
    }
    mhsa = {n: arms[f"MHSA, n = {n}"] for n, arms in by_length.items()}
    slopes = [slope_at_loss(mhsa, "row_range", loss) for loss in (2.2, 2.1, 2.0)]
    assert f"slopes of {in_order(f'{slope.mean:+.2f}' for slope in slopes)} with wide intervals" in text
    assert all(slope.low < 0 for slope in slopes)
    assert f"where chance gives {chance_slope(list(mhsa), PROBED_HEADS):+.2f}" in text
    for n, words in ((256, "times MHSA's at n = 256"), (512, "times at 512")):
        ls = by_length[n][f"LS, n = {n}"]
        ratios = sorted(
            log_ratio_at_loss(ls, mhsa[n], "max_logit", loss).exp().mean for loss in (2.2, 2.1, 2.0)
        )
        assert f"{ratios[0]:.2f} to {ratios[-1]:.2f} {words}" in text


def test_which_heads_stay_global():
    readme, text = map(text_of, PAGES)
    sizes = STUDIES["allocation"].scales["laptop"]
    results = ResultsFile(RESULTS / "laptop" / "allocation").results
    losses = [results[sizes.trained(seed).key]["losses"] for seed in range(sizes.seeds)]
    rankings = {name: CHOICES[name] for name in RANKINGS}
    means = [
        confidence_interval(mean_regret(one, choose(one)) for one in losses) for choose in rankings.values()
    ]
    told = " and ".join(with_ends(one, "+.3f") for one in means)
    worst = max(max(regrets(one, choose(one))) for one in losses for choose in rankings.values())
    assert f"what they lose to them is {told}" in text
    assert f"nowhere more than {worst:.3f}" in text and f"within {worst:.3f} nats per byte" in readme
    ones = [1 << head for head in range(8)]
    every, average, best, none = (
        fmean(values)
        for values in zip(
            *((one[-1], fmean(one[layout] for layout in ones), min(one[layout] for layout in ones), one[0])
              for one in losses), strict=True,
        )
    )  # fmt: skip
    assert (
        f"Without any the loss is {none:.2f}, with one of the eight {average:.2f} on average, with the best "
        f"one {best:.2f}, and with all of them {every:.2f}"
    ) in text
    assert all(min(ones, key=one.__getitem__) >= 1 << 4 for one in losses)
    kept = [
        repair
        for seed, one in enumerate(losses)
        if (repair := Repaired.of(sizes.repairs(seed, one), one, results)) is not None
    ]
    correlations = [known for repair in kept if (known := repair.correlation) is not None]
    assert f"its rank correlation is {in_order(f'{known:.2f}' for known in correlations)} by seed" in text
    assert confidence_interval(correlations).low < CORRELATION
    for name, choose in rankings.items():
        best = [choose(one)[k] == optimal_layouts(one)[k] for one in losses for k in kept[0].losses]
        assert f"In {sum(best)} of {len(best)} cases the choice of either ranking" in text
        assert abs(confidence_interval(repair.regret(name) for repair in kept).mean) < 0.001


def gpu_run(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    probed = [line for line in lines if "probe" in line]
    return {
        "constant_until": 1800,
        "validation_curve": [[line["step"], line["validation_loss"]] for line in probed],
        "copying_curve": [[line["step"], line["copying_loss"]] for line in probed],
        "probe": {
            "step": [line["step"] for line in probed],
            **probe_series([line["probe"] for line in probed]),
        },
    }


def test_unfinished_runs_on_one_gpu():
    text = text_of(REPRODUCTION)
    shares = []
    for rate in ("6e-4", "3e-3"):
        ls, mhsa = (gpu_run(RESULTS / "gpu" / f"{name}-{rate}-seed-0") for name in ("LS", "MHSA"))
        logits = [[at_loss(run, "max_logit", loss) for loss in (*LOSSES, 1.0)] for run in (ls, mhsa)]
        for name, values in zip((f"LS, {rate}", f"MHSA, {rate}"), logits, strict=True):
            assert row(name, ("" if value is None else f"{value:.0f}" for value in values)) in text
        ratios = [None if None in pair else pair[0] / pair[1] for pair in zip(*logits, strict=True)]
        assert row("LS/MHSA", ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)) in text
        for loss in LOSSES:
            ours, theirs = step_at(ls, loss), step_at(mhsa, loss)
            assert ours is not None and theirs is not None
            shares.append(ours / theirs)
        copying = [copying_step(run) for run in (ls, mhsa)]
        if copying == [None, None]:
            assert f"at {rate} neither does yet" in text
        else:
            assert (
                f"At {rate} both begin to copy, LS after {copying[0]:,} steps and MHSA after {copying[1]:,}"
                in text
            )
    assert f"LS needs {min(shares):.2f} to {max(shares):.2f} of the steps" in text


@pytest.mark.parametrize("scale", ["overnight", "laptop"])
def test_committed_verdicts_are_those_of_the_rules(scale, tmp_path):
    folder = tmp_path / scale
    shutil.copytree(RESULTS / scale, folder)
    with patch.object(FigureCanvasAgg, "print_png"):
        judge_all(scale, folder)
    files = sorted(RESULTS.glob(f"{scale}/*/findings.json"))
    assert files
    for file in files:
        assert (folder / file.parent.name / file.name).read_bytes() == file.read_bytes()


def test_rates_that_are_too_high(overnight):
    """A row per rate: means over seeds of the largest logit at any step and of the last loss."""
    text = text_of(REPRODUCTION)
    sizes, results = overnight
    runs = finished(sizes.stress_trials(range(sizes.other_seeds)), results)
    assert f"None of the {sum(map(len, runs.values()))} runs diverged" in text
    assert all(run["diverged_at"] is None for arm in runs.values() for run in arm)
    logits = {at: fmean(max(run["probe"]["max_logit"]) for run in arm) for at, arm in runs.items()}
    losses = {at: fmean(run["validation_loss"] for run in arm) for at, arm in runs.items()}
    for rate in sizes.stress_rates:
        arms = [(name, rate) for name in ("MHSA", "LS", "MHSA + QK-norm")]
        cells = [*(f"{logits[at]:.0f}" for at in arms), *(f"{losses[at]:.2f}" for at in arms)]
        assert row(rate_text(rate), cells) in text
    assert sizes.fp32_rate is not None
    exact = [(name, sizes.fp32_rate) for name in ("MHSA, fp32", "LS, fp32")]
    assert "MHSA ends at {:.2f} and LS at {:.2f}".format(*(losses[at] for at in exact)) in text
    assert "the largest logits at {:.0f} and {:.0f}".format(*(logits[at] for at in exact)) in text
    peaks = (f"{max(run['probe']['max_logit']):.0f}" for run in runs["LS", 6e-2])
    assert f"one seed makes most of LS's mean ({', '.join(peaks)})" in text
    for rate in sizes.stress_rates:
        assert losses["MHSA + QK-norm", rate] < min(losses["MHSA", rate], losses["LS", rate])
        ratio = logits["MHSA + QK-norm", rate] / logits["MHSA", rate]
        assert 1 < ratio < 1.1 if rate < 6e-2 else ratio < 0.25
        ls, mhsa = (fmean(run["constant_loss"] for run in runs[name, rate]) for name in ("LS", "MHSA"))
        assert ls < mhsa and (losses["MHSA", rate] < losses["LS", rate]) == (rate < 6e-2)
        for name, begins in (("LS", True), ("MHSA", rate < 6e-2)):
            assert all(is_stuck(run) != begins for run in runs[name, rate])
    assert f"none of {sum(map(len, runs.values()))} runs" in PAGES[0].read_text()


def test_rounding(overnight):
    text = text_of(REPRODUCTION)
    sizes, results = overnight
    audits = finished(sizes.stress_audits(range(sizes.other_seeds)), results)

    def errors(number, arm="", precisions=AUDITED):
        found = [
            error_over_seeds(audit, precision, matrix, number)
            for name, audit in audits.items()
            if name.startswith(arm)
            for matrix, precision in product("qk", precisions)
        ]
        return [error for error in found if error is not None]

    biases = errors("bias", precisions=AUDITED[1:])
    biased = sum(bias.low > 0 or bias.high < 0 for bias in biases)
    assert f"of the {len(biases)} intervals of the bias in the three kinds of bf16 {biased} exclude 0" in text
    assert f"where {len(biases) / 20:.1f} would by chance" in text
    common = [error.mean for error in errors("mean_error")]
    assert f"the mean error is {min(common):.2f} to {max(common):.2f} times its standard error" in text
    spreads = []
    for arm in ("LS", "MHSA, n", "MHSA, fp32", "MHSA + QK-norm"):
        noise = sorted(round(100 * error.mean) for error in errors("noise", arm, ["bf16"]))
        spreads.append(" to ".join(map(str, dict.fromkeys((noise[0], noise[-1])))))
    assert (
        "the noise is {} % of the gradient with LS, {} % with MHSA, {} % with MHSA that was trained in fp32, "
        "and {} % with QK-norm".format(*spreads)
    ) in text
    plain, *rounded = (errors("noise", precisions=[precision]) for precision in AUDITED[1:])
    more = max(one.mean / other.mean for noise in rounded for one, other in zip(noise, plain, strict=True))
    assert f"adds at most {100 * (more - 1):.0f} % to it" in text
