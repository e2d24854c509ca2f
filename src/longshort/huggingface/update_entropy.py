"""The spectral entropy of what training does to the queries and keys of a Hugging Face decoder, by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longshort.huggingface.projections import LayerProjections, Rows, find_projections
from longshort.layers import LongShortAttention
from longshort.stability import QueryKeyWeights, UpdateEntropy

if TYPE_CHECKING:
    from collections.abc import Sequence


def update_entropy_of(model: nn.Module) -> UpdateEntropy:
    """Make an `UpdateEntropy` for a decoder of transformers, with layers in the order of a `LogitMonitor`.

    The weights of a head are the rows of the one matrix that makes its queries, and of the one that makes
    its keys, as `longshort.huggingface.QKClip` finds them, without biases. What is done to queries and keys
    afterwards (scale, normalization of each head, rotation) is left out.

    Args:
        model: as for `LogitMonitor`. Its parameters must stay the same objects.

    Raises:
        ValueError: parameters are sharded; or a head's queries or keys are made by no matrix, or by several,
            as with QK-norm over all heads together, multi-head latent attention or LoRA.
    """
    if any(isinstance(module, LongShortAttention) for module in model.modules()):
        return UpdateEntropy(model)
    return UpdateEntropy.of_layers([_weights_of(layer) for layer in find_projections(model)])


def _weights_of(layer: LayerProjections) -> QueryKeyWeights:
    heads = [[rows for rows in parts if rows.parameter.ndim == 2] for parts in (*layer.queries, *layer.keys)]
    if (
        not all(len(matrices) == 1 for matrices in heads)
        or len({_matrix(part[0]).shape for part in heads}) > 1
    ):
        raise ValueError(
            f"the update of queries and keys needs one matrix for the queries of each head and one for its "
            f"keys, of equal sizes; {layer.name} ({type(layer.module).__name__}) has others, as QK-norm over "
            "all heads, multi-head latent attention and LoRA have"
        )
    return QueryKeyWeights(len(layer.queries), lambda: _stacked([part[0] for part in heads]))


def _stacked(heads: Sequence[Rows]) -> Tensor:
    return torch.stack([_matrix(rows) for rows in heads])


@torch.no_grad()
def _matrix(rows: Rows) -> Tensor:
    """Return a copy of a head's weights, (head_dim, embed_dim)."""
    found = rows.parameter.index_select(rows.dim, rows.indices)
    return found if rows.dim == 0 else found.T
