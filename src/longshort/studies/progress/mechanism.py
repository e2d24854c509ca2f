"""Why logits grow: heads of other sizes, and hidden keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longshort.reporting.intervals import (
    Interval,
    confidence_interval,
    paired_difference,
    paired_log_ratio,
)
from longshort.reporting.page import Figure, Section
from longshort.reporting.plots import draw_curves
from longshort.studies.framework.comparison import Arms, difference_text, interval_text
from longshort.studies.framework.study import Claim, Outcome, Verdict
from longshort.studies.language.arms import LS, MHSA, Variant
from longshort.studies.language.equal_progress import (
    CORRECTED,
    LOSSES,
    at_loss,
    at_two_losses,
    judge_at_losses,
    log_ratio_at_loss,
    losses_reached,
    p_of_partly,
    ratios_text,
    slopes_at_loss,
)
from longshort.studies.progress.arms import LS_HIDING, LS_SIZES, MHSA_HIDING, MHSA_SIZES, Sizes
from longshort.studies.progress.figures import by_progress, loss_table

_LOSSES = LOSSES[:3]
"""The runs of the mechanism end at 1.95 nats per byte."""

Part = Callable[[float], tuple[Interval, Interval]]
"""Returns, at a loss, what a part of the claim says of MHSA, and how far it is above LS: both below 0 if the
part holds."""

MECHANISM = Claim(
    "mechanism",
    "MHSA's logits grow because text depends densely on nearby tokens, which a head of few dimensions cannot "
    "represent: they are smaller with wider heads, and where hidden keys make the dependency sparse.",
    "At equal progress MHSA's logits are as large with wider heads and with hidden keys, or both do as much "
    "for LS.",
    "95 % intervals, paired over seeds, of the largest logit where the validation loss first falls to "
    f"{', '.join(map(str, _LOSSES[:-1]))} and {_LOSSES[-1]} nats per byte, at those of the losses that all "
    "runs judged here reach. (a) The slope of MHSA's log largest logit over log head_dim, 8 heads of 8 to 1 "
    "of 64, is below 0, and over 8 to 32 it is below LS's slope. (b) With half of the keys hidden in "
    "training, the ratio to MHSA with all keys is below 1, and below LS's ratio. A part holds if so at two "
    "or more losses and the opposite, a slope of MHSA above 0 or a ratio above 1, at none; it is opposed if "
    "the opposite is so at two or more and the part at none. Shown: both hold. Partly: one holds, and the "
    "other is not opposed. Contradicted: one is opposed, and the other does not hold. Open unless all runs "
    f"reach two of the losses. {CORRECTED}",
    paper="the argument of the paper",
)


def judge_mechanism(arms: Arms) -> Verdict:
    half = {plain: hiding[0.5].name for plain, hiding in ((MHSA.name, MHSA_HIDING), (LS.name, LS_HIDING))}
    sized = (*MHSA_SIZES.values(), *LS_SIZES.values())
    needed = [*(variant.name for variant in sized), *half.values()]

    def slopes_over_head_dim(sizes: Mapping[int, Variant], loss: float) -> dict[int, float | None]:
        return slopes_at_loss({dim: arms[variant.name] for dim, variant in sizes.items()}, "max_logit", loss)

    def slope_over_head_dim(sizes: Mapping[int, Variant], loss: float) -> Interval:
        return confidence_interval(slopes_over_head_dim(sizes, loss).values())

    def hiding_ratios(name: str, loss: float) -> dict[int, float | None]:
        """The ratio of the largest logit with half of the keys hidden to that with all keys, by seed."""
        hiding, plain = (arms[arm].by_rate["best"] for arm in (half[name], name))
        return {
            seed: _ratio(at_loss(hiding[seed], "max_logit", loss), at_loss(plain[seed], "max_logit", loss))
            for seed in hiding
        }

    def by_size(loss: float) -> tuple[Interval, Interval]:
        """Return MHSA's slope, and how far it is above LS's over the same sizes."""
        shared = {dim: variant for dim, variant in MHSA_SIZES.items() if dim in LS_SIZES}
        above = paired_difference(slopes_over_head_dim(shared, loss), slopes_over_head_dim(LS_SIZES, loss))
        return slope_over_head_dim(MHSA_SIZES, loss), above

    def by_hiding(loss: float) -> tuple[Interval, Interval]:
        """Return the logarithms of MHSA's ratio, and of its relation to LS's."""
        return (
            log_ratio_at_loss(arms[half[MHSA.name]], arms[MHSA.name], "max_logit", loss),
            paired_log_ratio(hiding_ratios(MHSA.name, loss), hiding_ratios(LS.name, loss)),
        )

    def decide_part(part: Part, losses: Sequence[float]) -> tuple[Outcome, float]:
        at = {loss: part(loss) for loss in losses}

        def outcome_at(loss: float) -> Outcome:
            own, to_ls = at[loss]
            if own.high < 0 and to_ls.high < 0:
                return Outcome.SHOWN
            return Outcome.CONTRADICTED if own.low > 0 else Outcome.NOT_SHOWN

        def p_at(loss: float, outcome: Outcome) -> float:
            own, to_ls = at[loss]
            if outcome is Outcome.CONTRADICTED:
                return own.p_above(0.0)
            return max(own.p_below(0.0), to_ls.p_below(0.0))

        return at_two_losses(outcome_at, p_at)(losses)[:2]

    def decide(losses: Sequence[float]) -> tuple[Outcome, float, float | None]:
        parts = [decide_part(part, losses) for part in (by_size, by_hiding)]
        outcomes = {outcome for outcome, _ in parts}
        one_of_two = min(1.0, 2 * min(p for _, p in parts))
        if outcomes == {Outcome.SHOWN}:
            both = max(p for _, p in parts)
            return Outcome.SHOWN, both, p_of_partly(both, one_of_two)
        if Outcome.SHOWN in outcomes:
            outcome = Outcome.NOT_SHOWN if Outcome.CONTRADICTED in outcomes else Outcome.PARTLY
        else:
            outcome = Outcome.CONTRADICTED if Outcome.CONTRADICTED in outcomes else Outcome.NOT_SHOWN
        return outcome, one_of_two if outcome.is_claim else 1.0, None

    def evidence(losses: Sequence[float]) -> str:
        texts = []
        for name, sizes in ((MHSA.name, MHSA_SIZES), (LS.name, LS_SIZES)):
            slopes = (f"{difference_text(slope_over_head_dim(sizes, loss))} at {loss}" for loss in losses)
            texts.append(f"slope of {name}'s log largest logit over log head_dim {', '.join(slopes)}")
        above = (f"{difference_text(by_size(loss)[1])} at {loss}" for loss in losses)
        texts.append(
            f"over head_dim {min(LS_SIZES)} to {max(LS_SIZES)}, {MHSA.name}'s slope less {LS.name}'s "
            f"{', '.join(above)}"
        )
        for plain, hiding in ((MHSA, MHSA_HIDING), (LS, LS_HIDING)):
            for variant in hiding.values():
                results = arms[variant.name].results() if variant.name in arms else []
                reached = losses_reached(results, losses) if results else []
                if reached:
                    ratios = ratios_text(arms[variant.name], arms[plain.name], "max_logit", reached)
                    texts.append(f"{variant.name}, ratio to {plain.name} with all keys {ratios}")
        relations = (f"{interval_text(by_hiding(loss)[1].exp())} at {loss}" for loss in losses)
        texts.append(
            f"with half of the keys hidden, {MHSA.name}'s ratio over {LS.name}'s {', '.join(relations)}"
        )
        return f"At equal losses: {'; '.join(texts)}."

    def here(loss: float) -> str:
        (slope, _), (ratio, _) = by_size(loss), by_hiding(loss)
        return (
            f"MHSA: slope over head_dim {difference_text(slope)}, {interval_text(ratio.exp())} times with "
            "hidden keys"
        )

    return judge_at_losses(MECHANISM, arms, needed, decide, evidence, here, _LOSSES)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def mechanism_sections(chosen: Sizes, arms: Arms, folder: Path) -> list[Section]:
    if chosen.mechanism is None or not arms:
        return []
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
            table=loss_table(arms, "max_logit", "largest logit"),
            figures=[
                Figure(
                    draw_curves(panels, folder / "mechanism.png"),
                    "On 32 fixed validation windows, over the validation loss there.",
                )
            ],
        )
    ]
