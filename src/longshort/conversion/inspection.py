"""The search for the key/value heads of a decoder that need distant tokens, and a layout within a budget.

The text is cut into three parts that share nothing. On the first, heads are ranked and layouts searched; the
second decides which of the layouts is proposed; on the third their losses are reported. A limit of the rise
holds on the first and on the second.

The layouts are

- *heads*: single heads, ranked;
- *layers*: all heads of a layer together, ranked by their sum;
- *mixed*: the better of the two, with single heads exchanged for as long as the measured loss falls;
- *mass*: heads ranked by their attention to distant keys, a poor guide, for comparison.

By default heads are ranked by slopes at gates between global and local (`gates`), in a few passes for all
heads together, with gates that move towards a layout within the budget (`search.descend`). With
`measure="loss"` the cheapest heads become local in rounds, and each round measures what every remaining head
would cost, in a pass for each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longshort.checks import require_integer
from longshort.conversion.budget import Budget, LimitRise
from longshort.conversion.gates import measure_mass, measure_slopes
from longshort.conversion.heads import DecoderHeads, Kept, KVHead, find_heads
from longshort.conversion.journal import Journal
from longshort.conversion.losses import LossMeter
from longshort.conversion.search import (
    Unit,
    add_units,
    by_score,
    descend,
    exchange,
    fewest_within,
    first_units,
    greedy_order,
    head_units,
    layer_units,
    score_path,
)
from longshort.evaluation.positions import position_limit
from longshort.huggingface import apply, layouts_of, remove
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor
    from transformers import PreTrainedModel

Measure = Literal["gate", "loss"]
PARTS = ("ranking", "choice", "report")
_PATH = (0.75, 0.5)  # places of all gates at which slopes are measured
_DESCENTS = 5
_SHORTLIST, _EXCHANGES = 6, 3
_SLOPE_COST = 3.5  # passes over the text that slopes take


@dataclass(frozen=True)
class Proposal:
    """A layout, and what it costs.

    Attributes:
        name: how it was found: heads, layers, mixed or mass.
        kept: the key/value heads that are global.
        rises: rise of the loss against all heads global, nats per token, by part of the text.
    """

    name: str
    kept: Kept
    rises: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_heads`.

    Attributes:
        heads: the decoder's heads.
        window, sink_tokens: settings of the local heads.
        budget: the budget that the layouts keep to.
        losses: loss with all heads global, nats per token, by part of the text.
        scores: the worth of each head's distance, nats per token, see `score_path`.
        mass: mean attention of each head to keys outside the window and the sinks.
        proposals: a layout per ranking, the best on the choice part first, that of the mass last.
    """

    heads: DecoderHeads
    window: int
    sink_tokens: int
    budget: Budget
    losses: dict[str, float]
    scores: dict[KVHead, float]
    mass: dict[KVHead, float]
    proposals: list[Proposal]

    @property
    def best(self) -> Proposal:
        """The proposed layout."""
        return self.proposals[0]

    @property
    def excess(self) -> float:
        """The nats per token by which the proposed layout exceeds a limit of the rise on the report part.

        0 if it keeps to the limit, or there is none.
        """
        if not isinstance(self.budget, LimitRise):
            return 0.0
        return max(0.0, self.best.rises["report"] - self.budget.nats)

    @property
    def layouts(self) -> list[HeadLayout | None]:
        """The proposed layout of each layer."""
        return self.heads.layouts(self.best.kept, self.window, self.sink_tokens)


def inspect_heads(
    model: PreTrainedModel,
    parts: Sequence[Int64[Tensor, "count length"]],
    budget: Budget,
    *,
    window: int,
    sink_tokens: int,
    journal: Journal,
    measure: Measure = "gate",
    progress: Callable[[float, float], None] | None = None,
) -> Inspection:
    """Find which heads of a decoder should stay global.

    Args:
        model: a decoder of transformers without layouts, on any device; it is left unchanged.
        parts: windows of the text to rank on, to choose on and to report on.
        budget: the budget that layouts must keep to.
        window: keys that a local head's query sees, itself included.
        sink_tokens: number of first keys that local heads see too.
        journal: finished measurements, which are not repeated.
        measure: "gate" or "loss": how heads are ranked.
        progress: called with the work done and an estimate of the total, in passes over the ranking part.

    Raises:
        ValueError: an argument is out of its range; the model has layouts, or cannot attend by layouts; or
            the windows are not longer than what local heads see.
    """
    require_integer("window", window, minimum=1)
    require_integer("sink_tokens", sink_tokens, minimum=0)
    if measure not in ("gate", "loss"):
        raise ValueError(f"measure must be 'gate' or 'loss', got {measure!r}")
    if len(parts) != len(PARTS):
        raise ValueError(f"parts must be windows for {', '.join(PARTS)}, got {len(parts)} parts")
    limit = position_limit(model)
    for part in parts:
        if limit is not None and part.shape[1] > limit:
            raise ValueError(
                f"parts must hold windows of at most {limit} tokens, the model's learned positions, got "
                f"{part.shape[1]}"
            )
        if part.shape[1] <= window + sink_tokens:
            raise ValueError(
                f"parts must hold windows longer than window + sink_tokens = {window + sink_tokens}, got "
                f"{part.shape[1]} tokens"
            )
    if layouts_of(model) is not None:
        raise ValueError("model must be without layouts; longshort.huggingface.remove takes them away")
    heads = find_heads(model)
    was_training = model.training
    apply(model, heads.layouts(heads.candidates, window, 0))
    model.eval()
    try:
        search = _Search(model, heads, parts, budget, window, sink_tokens, journal, measure, progress)
        return search.run()
    finally:
        remove(model)
        model.train(was_training)


class _Search:
    def __init__(
        self,
        model: PreTrainedModel,
        heads: DecoderHeads,
        parts: Sequence[Tensor],
        budget: Budget,
        window: int,
        sink_tokens: int,
        journal: Journal,
        measure: Measure,
        progress: Callable[[float, float], None] | None,
    ) -> None:
        self._model, self._heads, self._budget = model, heads, budget
        self._parts: dict[str, Tensor] = dict(zip(PARTS, parts, strict=True))
        self._window, self._sink_tokens = window, sink_tokens
        self._journal, self._measure, self._progress = journal, measure, progress
        self._meters = {
            name: LossMeter(model, heads, part, window, sink_tokens) for name, part in self._parts.items()
        }
        self._scores: dict[KVHead, float] = {}
        self._base: Kept | None = None
        self._done, self._guess = 0.0, 1.0

    def run(self) -> Inspection:
        heads, everything = self._heads, frozenset(self._heads.candidates)
        most = None
        if not isinstance(self._budget, LimitRise):
            most = self._budget.most_heads(heads, self._window, self._sink_tokens)
        self._guess = self._all_work(most)
        losses = {part: self._loss(everything, part) for part in PARTS}
        mass = self._mass()
        self._scores = score_path(heads, _PATH, self._slopes)
        found = {
            "heads": self._cut(self._order(head_units(heads), most), most),
            "layers": self._cut(self._order(layer_units(heads), most), most),
        }
        found["mixed"] = self._mix(found, most)
        found["mass"] = first_units(by_score(mass, head_units(heads)), len(found["mixed"]))
        proposals = [
            Proposal(name, kept, {part: self._loss(kept, part) - losses[part] for part in PARTS})
            for name, kept in found.items()
        ]
        proposals.sort(key=lambda proposal: (proposal.name == "mass", self._preference(proposal)))
        self._report(self._guess - self._done)
        return Inspection(
            heads, self._window, self._sink_tokens, self._budget, losses, self._scores, mass, proposals
        )

    def _order(self, units: list[Unit], most: int | None) -> list[Unit]:
        """Rank units, the most important first."""
        if self._measure == "loss":
            return greedy_order(units, most or 0, self._measured_changes)
        scores = self._scores
        if most is not None and all(len(unit) == 1 for unit in units):
            scores = descend(self._heads, scores, most, _DESCENTS, self._slopes)
        return by_score(scores, units)

    def _cut(self, order: list[Unit], most: int | None) -> Kept:
        """Keep as many of the first units as the budget allows, or as few as it needs."""
        if most is None:
            return fewest_within(order, self._highest, self._rise)
        return first_units(order, most)

    def _mix(self, found: dict[str, Kept], most: int | None) -> Kept:
        """Refine the better of the layouts by exchanges of heads."""
        units = head_units(self._heads)
        if most is None:
            start = min(found.values(), key=len)
        else:
            start = add_units(units, min(found.values(), key=self._rank_loss), most, self._changes)
        kept = exchange(
            start, units, _SHORTLIST, _EXCHANGES, self._changes, self._measured_changes, self._rank_loss
        )
        if most is None:  # a lower loss may allow fewer heads, unless only the ranking part gained
            kept = kept if self._rise(kept) <= self._highest else start
            kept = self._cut(by_score(self._scores, [unit for unit in units if unit <= kept]), most)
        return kept

    def _preference(self, proposal: Proposal) -> tuple[float, float]:
        """Return a key that sorts proposals by their rises on the choice part, the best first."""
        rise, count = proposal.rises["choice"], float(len(proposal.kept))
        return (count, rise) if isinstance(self._budget, LimitRise) else (rise, count)

    @property
    def _highest(self) -> float:
        """The rise that is allowed."""
        assert isinstance(self._budget, LimitRise)
        return self._budget.nats

    def _rise(self, kept: Kept) -> float:
        """Measure the rise of the loss on ranking and choice: the larger, or the first that is too large."""
        everything = frozenset(self._heads.candidates)
        largest = -math.inf
        for part in ("ranking", "choice"):
            largest = max(largest, self._loss(kept, part) - self._loss(everything, part))
            if largest > self._highest:
                break
        return largest

    def _changes(self, kept: Kept, units: Sequence[Unit]) -> list[float]:
        """Estimate to first order how the loss changes if each of the units alone is flipped."""
        slopes = self._slopes({head: float(head in kept) for head in self._heads.candidates})
        return [sum(-slopes[head] if head in kept else slopes[head] for head in unit) for unit in units]

    def _measured_changes(self, kept: Kept, units: Sequence[Unit]) -> list[float]:
        """Measure how the loss changes if each of the units alone is flipped."""
        before = self._rank_loss(kept)
        flipped = [kept ^ unit for unit in units]
        if self._base != kept and not all(
            self._journal.knows(_name("ranking", self._bits(x))) for x in flipped
        ):
            self._meters["ranking"].measure_base(kept)
            self._base = kept
            self._report(1.0)
        return [self._rank_loss(other) - before for other in flipped]

    def _rank_loss(self, kept: Kept) -> float:
        return self._loss(kept, "ranking")

    def _loss(self, kept: Kept, part: str) -> float:
        name = _name(part, self._bits(kept))
        share = self._parts[part].numel() / self._parts["ranking"].numel()
        losses = self._remember(name, lambda: self._meters[part].measure(kept), share)
        return sum(losses) / len(losses)

    def _slopes(self, gates: Mapping[KVHead, float]) -> dict[KVHead, float]:
        def measure() -> dict[KVHead, float]:
            return measure_slopes(
                self._model, self._heads, gates, self._parts["ranking"], self._window, self._sink_tokens
            )

        places = ",".join(f"{gates[head]:.6g}" for head in self._heads.candidates)
        name = f"slopes {hashlib.sha256(places.encode()).hexdigest()[:16]}"
        return self._by_head(name, measure, _SLOPE_COST)

    def _mass(self) -> dict[KVHead, float]:
        def measure() -> dict[KVHead, float]:
            mass = measure_mass(
                self._model, self._heads, self._parts["ranking"], [self._window], self._sink_tokens
            )
            return {head: outside[0] for head, outside in mass.items()}

        return self._by_head("mass", measure, 1.5)

    def _by_head(
        self, name: str, measure: Callable[[], dict[KVHead, float]], cost: float
    ) -> dict[KVHead, float]:
        candidates = self._heads.candidates

        def measure_list() -> list[float]:
            values = measure()
            return [values[head] for head in candidates]

        return dict(zip(candidates, self._remember(name, measure_list, cost), strict=True))

    def _remember(self, name: str, measure: Callable[[], list[float]], cost: float) -> list[float]:
        is_new = not self._journal.knows(name)
        values = self._journal.remember(name, measure)
        if is_new:
            self._report(cost)
        return values

    def _bits(self, kept: Kept) -> str:
        return "".join("1" if head in kept else "0" for head in self._heads.candidates)

    def _report(self, work: float) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, max(self._guess, self._done))

    def _all_work(self, most: int | None) -> float:
        """Estimate the passes over the ranking part that the search takes."""
        heads, layers = len(self._heads.candidates), len(layer_units(self._heads))
        slopes, losses = len(_PATH) + _EXCHANGES, _EXCHANGES * (2 * _SHORTLIST * 0.6 + 3)
        if self._measure == "loss":
            losses += 0.6 * 1.5 * (heads + layers)
        elif most is not None:
            slopes += _DESCENTS
        if most is None:
            choice = self._parts["choice"].numel() / self._parts["ranking"].numel()
            losses += 3 * heads.bit_length() * (1 + choice)
        proposals = 5 * sum(part.numel() for part in self._parts.values()) / self._parts["ranking"].numel()
        return slopes * _SLOPE_COST + losses + proposals + 1.5


def _name(part: str, bits: str) -> str:
    return f"loss {part} {int(bits, 2):x}"
