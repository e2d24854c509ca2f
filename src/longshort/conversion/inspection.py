"""Which key/value heads of a decoder need the distance: measures, layouts for a budget, and a proposal.

The text is cut into three parts that share nothing. On the first, heads are ranked and layouts searched; the
second decides which of the layouts is proposed; on the third their losses are reported.

Layouts come from these rankings, the first two of which are re-ranked as heads go local:

- *heads*: the loss that making one head local costs;
- *layers*: the same for all heads of a layer at once;
- *mixed*: the better of the two, with single heads exchanged for as long as the measured loss falls;
- *mass*: the attention that a head gives to distant keys, for information.

By default the cost of a unit is estimated to first order (`gates`), by one pass for all heads, and the loss
decides between the best; with `measure="loss"` each cost is a measured loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from longshort.checks import require_integer
from longshort.conversion.budget import Budget, LimitRise
from longshort.conversion.gates import measure_gates, measure_mass
from longshort.conversion.heads import DecoderHeads, Kept, KVHead, find_heads
from longshort.conversion.journal import Journal
from longshort.conversion.losses import LossMeter
from longshort.conversion.search import (
    Unit,
    add_units,
    exchange,
    head_units,
    layer_units,
    rank,
    remove_units,
    remove_within,
)
from longshort.huggingface import apply, layouts_of, remove
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor
    from transformers import PreTrainedModel

Measure = Literal["gate", "loss"]
PARTS = ("ranking", "choice", "report")
_SHORTLIST, _ROUNDS = 6, 4
_GATE_COST = 3.0  # passes that an estimate by gates takes


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
        window, sink_tokens: of local heads.
        budget: what the layouts keep to.
        losses: loss with all heads global, nats per token, by part of the text.
        costs: first-order rise of the loss if a head alone goes local from all global.
        mass: mean attention of each head to keys outside the window and the sinks.
        proposals: a layout per ranking, the best on the choice part first, that of the mass last.
    """

    heads: DecoderHeads
    window: int
    sink_tokens: int
    budget: Budget
    losses: dict[str, float]
    costs: dict[KVHead, float]
    mass: dict[KVHead, float]
    proposals: list[Proposal]

    @property
    def best(self) -> Proposal:
        """The proposed layout."""
        return self.proposals[0]

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
        model: a decoder of transformers without layouts, on any device; it is as before when this returns.
        parts: windows of the text to rank on, to choose on and to report on.
        budget: what layouts must keep to.
        window: keys that a local head's query sees, itself included.
        sink_tokens: number of first keys that local heads see too.
        journal: finished measurements, which are not repeated.
        measure: "gate" or "loss": how the costs of heads are estimated.
        progress: called with the work done and a guess of all, in passes over the ranking part.

    Raises:
        ValueError: an argument is out of its range; the model has layouts, or cannot attend by layouts; or
            the windows are not longer than what local heads see.
    """
    require_integer("window", window, minimum=1)
    require_integer("sink_tokens", sink_tokens, minimum=0)
    if measure not in ("gate", "loss"):
        raise ValueError(f"measure must be 'gate' or 'loss', got {measure!r}")
    if layouts_of(model) is not None:
        raise ValueError(
            "model must be without layouts, got one to which some were applied; remove() takes them away"
        )
    for part in parts:
        if part.shape[1] <= window + sink_tokens:
            raise ValueError(
                f"parts must hold windows longer than window + sink_tokens = {window + sink_tokens}, got "
                f"{part.shape[1]} tokens"
            )
    heads = find_heads(model)
    was_training = model.training
    apply(
        model, [None if layout is None else layout for layout in heads.layouts(heads.candidates, window, 0)]
    )
    model.eval()
    try:
        return _Inspector(model, heads, parts, budget, window, sink_tokens, journal, measure, progress).run()
    finally:
        remove(model)
        model.train(was_training)


class _Inspector:
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
        self._base: Kept | None = None
        self._done = 0.0
        self._guess = 1.0

    def run(self) -> Inspection:
        heads, everything = self._heads, frozenset(self._heads.candidates)
        most = None
        if not isinstance(self._budget, LimitRise):
            most = self._budget.most_heads(heads, self._window, self._sink_tokens)
        self._guess = self._all_work(most)
        losses = {name: self._loss(everything, name) for name in PARTS}
        mass = self._mass()
        costs = self._gates(everything)
        found = {"heads": self._search(head_units(heads), most)}
        found["layers"] = self._search(layer_units(heads), most)
        found["mixed"] = self._mix(found, most)
        found["mass"] = rank(mass, len(found["heads"]) if most is None else most)
        proposals = [
            Proposal(name, kept, {part: self._loss(kept, part) - losses[part] for part in PARTS})
            for name, kept in found.items()
        ]
        proposals.sort(key=lambda proposal: (proposal.name == "mass", self._preference(proposal)))
        self._report(self._guess - self._done)
        return Inspection(
            heads, self._window, self._sink_tokens, self._budget, losses, costs, mass, proposals
        )

    def _preference(self, proposal: Proposal) -> tuple[float, float]:
        """What makes a proposal better on the part for choices."""
        rise = proposal.rises["choice"]
        if isinstance(self._budget, LimitRise):  # the fewest heads of those that keep to it
            is_over = rise > self._budget.nats
            return (float("inf"), rise) if is_over else (float(len(proposal.kept)), rise)
        return rise, float(len(proposal.kept))

    def _search(self, units: list[Unit], most: int | None) -> Kept:
        everything = frozenset(self._heads.candidates)
        if most is not None:
            return remove_units(units, everything, most, self._estimate)
        return remove_within(units, everything, self._highest(), self._estimate, self._rank_loss)

    def _mix(self, found: dict[str, Kept], most: int | None) -> Kept:
        """Refine the better of the layouts by exchanges of heads."""
        units = head_units(self._heads)
        if most is None:
            start = min(found.values(), key=len)
        else:
            start = min(found.values(), key=self._rank_loss)
            start = add_units(units, start, most, self._estimate)
        kept = exchange(
            start, units, _SHORTLIST, _ROUNDS, self._estimate, self._measured_changes, self._rank_loss
        )
        if most is None:
            kept = remove_within(units, kept, self._highest(), self._estimate, self._rank_loss)
        return kept

    def _highest(self) -> float:
        assert isinstance(self._budget, LimitRise)
        return self._rank_loss(frozenset(self._heads.candidates)) + self._budget.nats

    def _rank_loss(self, kept: Kept) -> float:
        return self._loss(kept, "ranking")

    def _estimate(self, kept: Kept, units: Sequence[Unit]) -> list[float]:
        if self._measure == "loss":
            return self._measured_changes(kept, units)
        gates = self._gates(kept)
        return [sum(gates[head] for head in unit) for unit in units]

    def _measured_changes(self, kept: Kept, units: Sequence[Unit]) -> list[float]:
        before = self._rank_loss(kept)
        flipped = [kept ^ unit for unit in units]
        if not all(self._journal.knows(self._name("loss ranking", other)) for other in flipped):
            self._set_base(kept)
        return [self._loss(other, "ranking") - before for other in flipped]

    def _set_base(self, kept: Kept) -> None:
        if self._base != kept:
            self._meters["ranking"].measure_base(kept)
            self._base = kept
            self._report(1.0)

    def _loss(self, kept: Kept, part: str) -> float:
        def measure() -> list[float]:
            return self._meters[part].measure(kept)

        share = self._parts[part].numel() / self._parts["ranking"].numel()
        losses = self._remember(f"loss {part}", kept, measure, share)
        return sum(losses) / len(losses)

    def _gates(self, kept: Kept) -> dict[KVHead, float]:
        def measure() -> list[float]:
            gates = measure_gates(
                self._model, self._heads, kept, self._parts["ranking"], self._window, self._sink_tokens
            )
            return [gates[head] for head in self._heads.candidates]

        values = self._remember("gates", kept, measure, _GATE_COST)
        return dict(zip(self._heads.candidates, values, strict=True))

    def _mass(self) -> dict[KVHead, float]:
        def measure() -> list[float]:
            mass = measure_mass(
                self._model, self._heads, self._parts["ranking"], [self._window], self._sink_tokens
            )
            return [mass[head][0] for head in self._heads.candidates]

        values = self._remember("mass", frozenset(), measure, 1.5)
        return dict(zip(self._heads.candidates, values, strict=True))

    def _remember(
        self, what: str, kept: Kept, measure: Callable[[], list[float]], cost: float
    ) -> list[float]:
        is_new = not self._journal.knows(self._name(what, kept))
        values = self._journal.remember(self._name(what, kept), measure)
        if is_new:
            self._report(cost)
        return values

    def _name(self, what: str, kept: Kept) -> str:
        bits = "".join("1" if head in kept else "0" for head in self._heads.candidates)
        return f"{what} {int(bits, 2):x}"

    def _report(self, work: float) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, max(self._guess, self._done))

    def _all_work(self, most: int | None) -> float:
        """A guess of the passes over the ranking part that the search takes."""
        count, layers = len(self._heads.candidates), len(layer_units(self._heads))
        rounds = (count - (most or 0)).bit_length() + 1
        estimate = _GATE_COST if self._measure == "gate" else 0.6 * count / 2
        layer_estimate = _GATE_COST if self._measure == "gate" else 0.6 * layers / 2
        searched = rounds * estimate + min(rounds, layers.bit_length() + 1) * layer_estimate
        mixed = _ROUNDS * (estimate + 2 * _SHORTLIST * 0.6 + 3)
        others = sum(part.numel() for part in self._parts.values()) / self._parts["ranking"].numel()
        return searched + mixed + 5 * others + 1.5 + _GATE_COST


def seeded_choice(heads: DecoderHeads, most: int, seed: int) -> Kept:
    """Draw heads at random, to compare rankings with."""
    order = torch.randperm(len(heads.candidates), generator=torch.Generator().manual_seed(seed)).tolist()
    return frozenset(heads.candidates[index] for index in order[:most])
