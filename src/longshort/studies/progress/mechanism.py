"""Why logits grow: heads of other sizes, and hidden keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from longshort.reporting.intervals import Interval, paired_log_ratio
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import draw_curves
from longshort.studies.framework.comparison import Arms, difference_text, interval_text, mean_text
from longshort.studies.framework.study import Claim, Outcome, Verdict
from longshort.studies.language.arms import LS, MHSA, Variant
from longshort.studies.language.equal_progress import (
    LOSSES,
    at_loss,
    judge_at_losses,
    log_ratio_at_loss,
    losses_reached,
    ratios_text,
    slope_at_loss,
)
from longshort.studies.progress.arms import LS_HIDING, LS_SIZES, MHSA_HIDING, MHSA_SIZES, Sizes
from longshort.studies.progress.figures import by_progress

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
    paper="the argument of the paper",
)


def judge_mechanism(arms: Arms) -> Verdict:
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

    def here(loss: float) -> str:
        slope, ratio, _ = intervals(loss)
        return f"slope {difference_text(slope)}, hidden keys {interval_text(ratio.exp())}"

    return judge_at_losses(MECHANISM, arms, needed, outcome_at, p_at, evidence, here=here)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def mechanism_sections(chosen: Sizes, arms: Arms, folder: Path) -> list[Section]:
    if chosen.mechanism is None or not arms:
        return []
    rows = [
        (name, *("–" if None in values else mean_text(values) for values in (
            [at_loss(result, "max_logit", loss) for result in arm.results()] for loss in LOSSES
        )))
        for name, arm in arms.items()
    ]  # fmt: skip
    panels = [
        by_progress({name: arm for name, arm in arms.items() if is_in(name)}, title, "max_logit")
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
