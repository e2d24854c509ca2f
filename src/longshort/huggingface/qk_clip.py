"""QK-clip for any Hugging Face decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.utils import logging

from longshort.checks import require_positive
from longshort.huggingface.projections import (
    LayerProjections,
    Rows,
    find_projections,
    require_whole_parameters,
)

_FACTORS = "_longshort_clip_factors"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Clipped:
    """A layer that is clipped.

    Attributes:
        name: the name of the layer.
        queries: what is scaled of each query head.
        keys: what is scaled of each KV head; None: nothing.
    """

    name: str
    queries: list[list[Rows]]
    keys: list[list[Rows]] | None

    def scale(self, head: int, factor: float, *, only_frozen: bool = False) -> None:
        """Scale the logits of a query head, or the part of that which is in frozen weights."""
        parts = [self.queries]
        if self.keys is not None:
            factor, parts = factor**0.5, [self.queries, self.keys]
        for part in parts:
            for rows in part[head]:
                if not only_frozen or not rows.parameter.requires_grad:
                    rows.scale(factor)

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in (self.queries, self.keys or []):
            for by_head in part:
                for rows in by_head:
                    yield rows.parameter

    @property
    def needs_frozen(self) -> bool:
        return any(not parameter.requires_grad for parameter in self.parameters())


class QKClip:
    """QK-clip of Kimi K2 (Moonshot AI 2025, arXiv 2507.20534) for a decoder of transformers: after an
    optimizer step, a head whose largest logit m was above the threshold τ gets smaller weights, so that the
    same input would give it τ.

    It acts as `longshort.stability.QKClip`: if a query head shares its KV head with no other, the rows of its
    queries and keys are scaled by sqrt(τ/m) each; else only those of its queries, by τ/m, so that the other
    heads stay as they are. So do heads whose keys have a part that all heads share, as in MLA (DeepSeek-V2
    and -V3), or have weights that make something else too.

    Which rows these are is measured when it is made: by gradients of queries and keys, then by scaling the
    rows of each layer, on a few tokens. A layer whose heads do not scale with their rows is refused, as with
    QK-norm whose gains all heads share; gains of each head are scaled. Biases are scaled along with weights.

    Adapters of PEFT: where trained weights alone can carry the scale, as the magnitudes of DoRA do, only
    they are scaled, and a checkpoint of the adapter holds the clip. Plain LoRA cannot: a head's weights are
    W + B·A, and to scale them by γ is to scale both W, which is frozen, and B. The model computes the same
    whether the adapter is merged or not, but a checkpoint of the adapter alone lacks γ·W. The first such clip
    logs a warning; save the merged model, or `frozen_factors` beside the adapter, which `restore_frozen`
    takes. `QKClipCallback` does the latter in the Trainer's checkpoints.

        clip = QKClip(model)
        with LogitMonitor(model) as monitor:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                clip.apply(monitor.reading().max_logit_by_head)

    Args:
        model: a decoder of transformers, as for `LogitMonitor`. Its parameters must stay the same objects,
            frozen or not.
        threshold: τ, > 0; K2 has 100.

    Raises:
        ValueError: threshold is not finite and > 0; parameters are sharded; or a layer's heads do not scale
            with rows of their own, as when other layers use them, or its attention is not found.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0) -> None:
        require_positive("threshold", threshold)
        self._model, self._threshold = model, threshold
        self._adapted = _adapted_module(model)
        trained_first = self._adapted is not None
        self._layers = [_checked(layer, trained_first) for layer in find_projections(model)]

    def apply(self, max_logit_by_head: Sequence[Sequence[float]]) -> int:
        """Scale the weights in place.

        Args:
            max_logit_by_head: for each layer one number per query head, as in `Reading`, measured in the
                passes of the step; over all processes, so that they scale alike.

        Returns:
            The number of query heads that were scaled.

        Raises:
            ValueError: the numbers are not those of the model's heads; or parameters are sharded by now, or
                others than before.
        """
        self._require_heads("max_logit_by_head", max_logit_by_head)
        self._require_parameters()
        clipped = 0
        for layer, max_logits in zip(self._layers, max_logit_by_head, strict=True):
            for head, max_logit in enumerate(max_logits):
                if self._threshold < max_logit < math.inf:  # false for NaN too
                    factor = self._threshold / max_logit
                    layer.scale(head, factor)
                    self._note_factor(layer, head, factor)
                    clipped += 1
        return clipped

    @property
    def frozen_factors(self) -> list[list[float]]:
        """Return by layer and query head the factor of its logits in frozen weights, of all clips of the
        model: what a checkpoint of its adapter lacks. 1 where it lacks nothing."""
        known = {} if self._adapted is None else self._adapted.__dict__.get(_FACTORS, {})
        return [list(known.get(layer.name, [1.0] * len(layer.queries))) for layer in self._layers]

    def restore_frozen(self, factors: Sequence[Sequence[float]]) -> None:
        """Scale frozen weights, so that `frozen_factors` are these, as after a load of the adapter that was
        saved with them.

        Raises:
            ValueError: the factors are not those of the model's heads, or not finite and > 0; the model has
                no adapters; or parameters are sharded by now, or others than before.
        """
        self._require_heads("factors", factors)
        if self._adapted is None:
            raise ValueError("model must have adapters of PEFT to restore what their checkpoints lack")
        for factor in (factor for by_head in factors for factor in by_head):
            require_positive("factors", factor)
        self._require_parameters()
        rows = zip(self._layers, factors, self.frozen_factors, strict=True)
        for layer, wanted, now in rows:
            for head, (goal, factor) in enumerate(zip(wanted, now, strict=True)):
                if goal != factor:
                    layer.scale(head, goal / factor, only_frozen=True)
        names = [layer.name for layer in self._layers]
        kept = {name: list(by_head) for name, by_head in zip(names, factors, strict=True)}
        self._adapted.__dict__[_FACTORS] = kept

    def _require_heads(self, name: str, by_head: Sequence[Sequence[float]]) -> None:
        wanted = [len(layer.queries) for layer in self._layers]
        found = [len(heads) for heads in by_head]
        if found != wanted:
            raise ValueError(f"{name} must have {wanted} heads by layer, got {found}")

    def _require_parameters(self) -> None:
        require_whole_parameters(self._model)
        held = {id(parameter) for parameter in self._model.parameters()}
        for layer in self._layers:
            if any(id(parameter) not in held for parameter in layer.parameters()):
                raise ValueError(
                    f"model must have the parameters that it had when QKClip was made, got others in "
                    f"{layer.name}, as load_state_dict(assign=True) or a merge of adapters puts there; make "
                    "another QKClip"
                )

    def _note_factor(self, layer: _Clipped, head: int, factor: float) -> None:
        if self._adapted is None or not layer.needs_frozen:
            return
        if _FACTORS not in self._adapted.__dict__:
            logger.warning(
                f"QK-clip has scaled frozen weights of {layer.name}, which a checkpoint of the adapter alone "
                "lacks: save the merged model, as merge_and_unload() gives it; or train with use_dora=True, "
                "whose magnitudes hold the scale"
            )
        known = self._adapted.__dict__.setdefault(_FACTORS, {})
        known.setdefault(layer.name, [1.0] * len(layer.queries))[head] *= factor


def _adapted_module(model: nn.Module) -> nn.Module | None:
    """Return the module that has adapters of PEFT, which goes when they are merged; None if none has."""
    return next((module for module in model.modules() if getattr(module, "peft_config", None)), None)


def _checked(layer: LayerProjections, trained_first: bool) -> _Clipped:
    """Return what scales the heads of a layer, by trial."""
    queries = _scaling_rows(layer, "queries", trained_first)
    if queries is None:
        raise ValueError(
            f"model must have heads whose queries scale with weights of their own, got {layer.name} "
            f"({type(layer.module).__name__}): {layer.fault_of('queries', layer.queries)}"
        )
    keys = _scaling_rows(layer, "keys", trained_first) if layer.group_size == 1 else None
    if keys is not None and trained_first and _are_trained(queries) and not _are_trained(keys):
        keys = None
    return _Clipped(layer.name, queries, keys)


def _scaling_rows(
    layer: LayerProjections, kind: Literal["queries", "keys"], trained_first: bool
) -> list[list[Rows]] | None:
    """Return the rows that scale the queries or keys of each head, or None; with `trained_first` those of
    trained parameters, if these do."""
    everything: list[list[Rows]] = getattr(layer, kind)
    trained = _only(everything, lambda rows: rows.parameter.requires_grad)
    choices = [*(_choices(trained) if trained_first else ()), *_choices(everything)]
    return next((rows for rows in choices if layer.fault_of(kind, rows) is None), None)


def _choices(by_head: list[list[Rows]]) -> Iterator[list[list[Rows]]]:
    """Yield what may scale the heads: one parameter, such as the gains of a norm; all; all but one, such as
    the first factor of LoRA in a layer with one head.

    Parameters of the same shape are tried together, since each head may have its own parameter.
    """
    shapes = list(dict.fromkeys(rows.parameter.shape for part in by_head for rows in part))
    for shape in shapes:
        yield _only(by_head, lambda rows, shape=shape: rows.parameter.shape == shape)
    if len(shapes) > 1:
        yield by_head
    for shape in shapes if len(shapes) > 2 else ():
        yield _only(by_head, lambda rows, shape=shape: rows.parameter.shape != shape)


def _only(by_head: list[list[Rows]], is_wanted: Callable[[Rows], bool]) -> list[list[Rows]]:
    return [[rows for rows in part if is_wanted(rows)] for part in by_head]


def _are_trained(by_head: list[list[Rows]]) -> bool:
    return all(rows.parameter.requires_grad for part in by_head for rows in part)
