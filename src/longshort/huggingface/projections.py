"""The weights that produce the queries and keys of each head of a Hugging Face decoder, by measurement.

A parameter of an attention layer belongs to a head in those rows (or columns) that have a gradient from the
head's queries or keys, if no other head has one there. So no table of model families is needed: fused and
interleaved projections, biases, transposed weights and adapters are found in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longshort.huggingface.dispatch import AttentionCall, listen, stop_listening
from longshort.huggingface.watch import decoder_of

if TYPE_CHECKING:
    from jaxtyping import Int

_TOKENS = 8
_TOLERANCE = 1e-3
"""Relative; the factors of a trial are powers of 2, by which linear functions scale exactly."""


@dataclass(frozen=True)
class Rows:
    """A part of a parameter.

    Attributes:
        parameter: the whole parameter.
        dim: dimension of the indices.
        indices: ascending.
    """

    parameter: nn.Parameter
    dim: int
    indices: Int[Tensor, " rows"]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the part in place."""
        scaled = self.parameter.index_select(self.dim, self.indices) * factor
        self.parameter.index_copy_(self.dim, self.indices, scaled)


@dataclass(frozen=True)
class LayerProjections:
    """The parts of parameters that produce the queries and keys of an attention layer.

    Attributes:
        module, name: the layer, and its name in the decoder.
        queries: for each query head.
        keys: for each KV head.
    """

    module: nn.Module
    name: str
    queries: list[list[Rows]]
    keys: list[list[Rows]]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return len(self.queries) // len(self.keys)

    @torch.no_grad()
    def scales(self, kind: Literal["queries", "keys"], rows_by_head: Sequence[Sequence[Rows]]) -> bool:
        """Return whether the queries, or keys, of each head scale as these rows do, apart from those of other
        heads and from all keys, or queries. Tries it; the weights are restored bit for bit."""
        if not all(rows_by_head):
            return False
        before = _queries_and_keys(self.module, self.inputs)
        factors = _trial_factors(len(rows_by_head))
        kept = {id(row.parameter): row.parameter for rows in rows_by_head for row in rows}
        copies = {key: parameter.clone() for key, parameter in kept.items()}
        try:
            for rows, factor in zip(rows_by_head, factors, strict=True):
                for row in rows:
                    row.scale(factor)
            after = _queries_and_keys(self.module, self.inputs)
        finally:
            for key, parameter in kept.items():
                parameter.copy_(copies[key])
        scaled, other = (0, 1) if kind == "queries" else (1, 0)
        return _is_close(after[other], before[other]) and all(
            _is_close(after[scaled][:, head], before[scaled][:, head] * factor)
            for head, factor in enumerate(factors)
        )


def find_projections(model: nn.Module) -> list[LayerProjections]:
    """Find the parameters behind the queries and keys of each attention layer, by a pass over a few tokens.

    The model, its mode and the random states stay as they are.

    Args:
        model: a decoder of transformers, as for `LogitMonitor`; its parameters must be whole on one device.

    Returns:
        The layers that attend, in the order of a `LogitMonitor`'s reading.

    Raises:
        ValueError: parameters are sharded; or no layer looks up its attention in transformers' registry.
    """
    decoder = decoder_of(model)
    require_whole_parameters(model)
    with _in_eval_mode(decoder), _with_gradients(decoder):
        inputs = _attention_inputs(decoder)
        if not inputs:
            raise ValueError(
                f"model must look up its attention in transformers' AttentionInterface, got "
                f"{type(model).__name__}, which does not"
            )
        return [
            _find(module, name, inputs[id(module)])
            for name, module in decoder.named_modules()
            if id(module) in inputs
        ]


def require_whole_parameters(model: nn.Module) -> None:
    """Raise a ValueError if parameters are sharded over processes."""
    for name, parameter in model.named_parameters():
        is_flat = type(parameter).__name__ == "FlatParameter"  # FSDP 1
        if isinstance(parameter, DTensor) or is_flat or hasattr(parameter, "ds_id"):  # FSDP 2, DeepSpeed
            raise ValueError(
                f"model must have its parameters whole in each process, got {name} sharded by FSDP, tensor "
                "parallelism or DeepSpeed"
            )


def _find(module: nn.Module, name: str, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> LayerProjections:
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    with torch.enable_grad():
        q, k = _queries_and_keys(module, inputs)
        found = [_rows_by_head(x, parameters) for x in (q, k)]
    return LayerProjections(module, name, found[0], found[1], inputs)


def _rows_by_head(x: Tensor, parameters: Sequence[nn.Parameter]) -> list[list[Rows]]:
    """Find the parts of parameters that make each head of (1, heads, tokens, head_dim) and no other."""
    heads = x.shape[1]
    if not x.requires_grad:
        return [[] for _ in range(heads)]
    weights = torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype) + 0.5
    touched: list[list[list[Tensor]]] = [[] for _ in parameters]  # by head and dimension: indices
    for head in range(heads):
        gradients = torch.autograd.grad(x[0, head], parameters, weights, retain_graph=True, allow_unused=True)
        for place, gradient in enumerate(gradients):
            is_touched = torch.zeros_like(parameters[place]) if gradient is None else gradient
            touched[place].append(_touched_indices(is_touched != 0))
    rows: list[list[Rows]] = [[] for _ in range(heads)]
    for parameter, by_head in zip(parameters, touched, strict=True):
        dim = _dimension_of_heads(by_head, parameter.shape)
        if dim is not None:
            for head, indices in enumerate(by_head):
                rows[head].append(Rows(parameter, dim, indices[dim]))
    return rows


def _touched_indices(is_touched: Tensor) -> list[Tensor]:
    """Return for each dimension the indices at which anything is touched."""
    dims = range(is_touched.ndim)
    return [
        is_touched.sum([other for other in dims if other != dim] or None).nonzero()[:, 0]
        if is_touched.ndim > 1
        else is_touched.nonzero()[:, 0]
        for dim in dims
    ]


def _dimension_of_heads(by_head: list[list[Tensor]], shape: torch.Size) -> int | None:
    """Return the dimension along which every head touches something that no other head does, or None."""
    for dim, size in enumerate(shape):
        counts = torch.zeros(size, dtype=torch.int64)
        for indices in by_head:
            counts[indices[dim].cpu()] += 1
        if counts.max() == 1 and all(len(indices[dim]) for indices in by_head):
            return dim
    return None


def _trial_factors(heads: int) -> list[float]:
    return [0.5 ** (1 + head % 2) for head in range(heads)]


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    error = (found.float() - wanted.float()).abs().amax()
    return bool(error <= _TOLERANCE * wanted.float().abs().amax())


class _Recorder:
    """A listener that keeps the queries and keys of one layer's last call, and the layers that called."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = module
        self.modules: dict[int, nn.Module] = {}
        self.tensors: tuple[Tensor, Tensor] | None = None

    def hears(self, module: nn.Module) -> bool:
        return self._module is None or module is self._module

    def on_call(self, call: AttentionCall) -> None:
        self.modules[id(call.module)] = call.module
        self.tensors = call.q, call.k


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[_Recorder]:
    listen(recorder)
    try:
        yield recorder
    finally:
        stop_listening(recorder)


def _queries_and_keys(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Run an attention layer alone; return its queries and keys, (1, heads, tokens, head_dim)."""
    args, options = inputs
    with _recording(_Recorder(module)) as recorder:
        module(*args, **options)
    assert recorder.tensors is not None
    return recorder.tensors


@torch.no_grad()
def _attention_inputs(decoder: nn.Module) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run the decoder on a few tokens; return the arguments of each attention layer, by its identity."""
    embedding: Any = decoder.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    weight = embedding.weight
    tokens = torch.linspace(0, weight.shape[0] - 1, _TOKENS, device=weight.device).long()[None]
    with _recording(_Recorder()) as recorder:
        decoder(input_ids=tokens, use_cache=False)
    own = {id(module) for module in decoder.modules()}
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs[id(module)] = args, options

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for key, module in recorder.modules.items()
        if key in own
    ]
    try:
        decoder(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _with_gradients(model: nn.Module) -> Iterator[None]:
    """Let all floating parameters have gradients, those of a frozen base too."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
