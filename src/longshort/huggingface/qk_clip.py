"""QK-clip for any Hugging Face decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from longshort.checks import require_positive
from longshort.huggingface.projections import LayerProjections, find_projections, require_whole_parameters


@dataclass(frozen=True)
class _Clipped:
    """A layer, and whether its keys are scaled beside its queries."""

    projections: LayerProjections
    scales_keys: bool


class QKClip:
    """QK-clip of Kimi K2 (Moonshot AI 2025, arXiv 2507.20534) for a decoder of transformers: after an
    optimizer step, a head whose largest logit m was above the threshold τ gets smaller weights, so that the
    same input would give it τ.

    It acts as `longshort.stability.QKClip`: if a query head shares its KV head with no other, the rows of its
    queries and keys are scaled by sqrt(τ/m) each; else only those of its queries, by τ/m, so that the other
    heads stay as they are. So do heads whose keys have a part that all heads share, as in MLA (DeepSeek-V2
    and -V3).

    Which rows these are is measured when it is made: by gradients of queries and keys, then by scaling the
    rows of each layer, on a few tokens. A layer whose heads do not scale with their rows is refused, as with
    most kinds of QK-norm. Biases are scaled along with weights, and a frozen base weight along with its LoRA
    adapter: the adapter alone cannot, so save the merged model.

        clip = QKClip(model)
        with LogitMonitor(model) as monitor:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                clip.apply(monitor.reading().max_logit_by_head)

    Args:
        model: a decoder of transformers, as for `LogitMonitor`. Its parameters must stay the same objects.
        threshold: τ, > 0; K2 has 100.

    Raises:
        ValueError: threshold is not finite and > 0; parameters are sharded or shared by layers; or a layer's
            heads do not scale with their rows, or its attention is not found.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0) -> None:
        require_positive("threshold", threshold)
        self._model, self._threshold = model, threshold
        self._layers = [_checked(projections) for projections in find_projections(model)]
        _require_own_parameters(self._layers)

    def apply(self, max_logit_by_head: Sequence[Sequence[float]]) -> int:
        """Scale the weights in place.

        Args:
            max_logit_by_head: for each layer one number per query head, as in `Reading`, measured in the
                passes of the step; over all processes, so that they scale alike.

        Returns:
            The number of query heads that were scaled.

        Raises:
            ValueError: the numbers are not those of the model's heads, or parameters are sharded by now.
        """
        wanted = [len(layer.projections.queries) for layer in self._layers]
        found = [len(heads) for heads in max_logit_by_head]
        if found != wanted:
            raise ValueError(f"max_logit_by_head must have {wanted} heads by layer, got {found}")
        require_whole_parameters(self._model)
        clipped = 0
        for layer, max_logits in zip(self._layers, max_logit_by_head, strict=True):
            for head, max_logit in enumerate(max_logits):
                if self._threshold < max_logit < math.inf:  # false for NaN too
                    _scale(layer, head, self._threshold / max_logit)
                    clipped += 1
        return clipped


def _scale(layer: _Clipped, head: int, factor: float) -> None:
    if layer.scales_keys:
        factor = factor**0.5
        for rows in layer.projections.keys[head]:
            rows.scale(factor)
    for rows in layer.projections.queries[head]:
        rows.scale(factor)


def _checked(layer: LayerProjections) -> _Clipped:
    """Return how the heads of a layer are scaled, by trial."""
    if layer.group_size == 1 and layer.scales(keys=True):
        return _Clipped(layer, scales_keys=True)
    if layer.scales(keys=False):
        return _Clipped(layer, scales_keys=False)
    raise ValueError(
        f"model must have heads whose queries scale with rows of weights of their own, got {layer.name} "
        f"({type(layer.module).__name__}), where a trial found none; QK-norm undoes such scaling"
    )


def _require_own_parameters(layers: Sequence[_Clipped]) -> None:
    owners: dict[int, str] = {}
    for layer in layers:
        projections = layer.projections
        parts = [*projections.queries, *(projections.keys if layer.scales_keys else [])]
        for parameter in {id(rows.parameter): rows.parameter for part in parts for rows in part}.values():
            owner = owners.setdefault(id(parameter), projections.name)
            if owner != projections.name:
                raise ValueError(f"layers must not share query weights, got {owner} and {projections.name}")
