"""The weights that produce the queries and keys of each head of a Hugging Face decoder, by measurement.

A parameter of an attention layer belongs to a head in those rows (or columns) that have a gradient from the
head's queries or keys, if no other head has one there. So no table of model families is needed: fused and
interleaved projections, biases, transposed weights and adapters are found in the same way. A trial shows
whether the heads scale with what was found.
"""

from __future__ import annotations

from collections import Counter
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
_NORM_TOLERANCE = 0.05
"""Relative; a norm undoes the factors of a trial up to its epsilon."""
_NOISE = 0.02
"""Standard deviation of the noise of a trial where weights are 0: that of most new weights."""


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
        shared: names of the layer's parameters that make its queries, or keys, but have other uses too.
    """

    module: nn.Module
    name: str
    queries: list[list[Rows]]
    keys: list[list[Rows]]
    shared: dict[Literal["queries", "keys"], list[str]]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return len(self.queries) // len(self.keys)

    def fault_of(
        self, kind: Literal["queries", "keys"], rows_by_head: Sequence[Sequence[Rows]]
    ) -> str | None:
        """Return why the queries, or keys, of each head do not scale as these rows do, without a change of
        other heads, of the keys, or queries, and of the values; None if they do.

        It is tried, with noise on all that was found: weights of 0 would show nothing. The weights are
        restored bit for bit.
        """
        if self.shared[kind]:
            return f"its {', '.join(self.shared[kind])} has other uses in the model"
        if not all(rows_by_head):
            return f"its {kind} are not made by weights of one head alone"
        factors = [0.5 ** (1 + head % 2) for head in range(len(rows_by_head))]
        parts = (part for by_head in (self.queries, self.keys) for part in by_head)
        with torch.no_grad(), _restored([rows.parameter for part in parts for rows in part]) as parameters:
            _add_noise(parameters)
            before = _attention_tensors(self.module, self.inputs)
            for rows, factor in zip(rows_by_head, factors, strict=True):
                for row in rows:
                    row.scale(factor)
            after = _attention_tensors(self.module, self.inputs)
        for name, found in after.items():
            if name != kind and not _is_close(found, before[name]):
                return f"its {kind} have weights in common with its {name}"
        heads = [(after[kind][:, head], before[kind][:, head], factor) for head, factor in enumerate(factors)]
        if all(_is_close(found, held * factor) for found, held, factor in heads):
            return None
        if all(_is_close(found, held, _NORM_TOLERANCE) for found, held, _ in heads):
            return f"its {kind} stay as they are when their weights are scaled; QK-norm undoes such scaling"
        return f"its {kind} do not scale with their weights, as if they were clipped, or normalised"


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
        layers = {name: module for name, module in decoder.named_modules() if id(module) in inputs}
        shared = _shared_parameters(model, list(layers.values()))
        return [_find(module, name, inputs[id(module)], shared) for name, module in layers.items()]


def require_whole_parameters(model: nn.Module) -> None:
    """Raise a ValueError if parameters are sharded over processes."""
    for name, parameter in model.named_parameters():
        is_flat = type(parameter).__name__ == "FlatParameter"  # FSDP 1
        if isinstance(parameter, DTensor) or is_flat or hasattr(parameter, "ds_id"):  # FSDP 2, DeepSpeed
            raise ValueError(
                f"model must have its parameters whole in each process, got {name} sharded by FSDP, tensor "
                "parallelism or DeepSpeed"
            )


def _shared_parameters(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Return the identities of parameters that have several uses in one of the layers, or uses in others or
    outside of them."""
    uses = Counter(id(p) for layer in layers for _, p in layer.named_parameters(remove_duplicate=False))
    seen = {id(layer) for layer in layers}
    outside: set[int] = set()
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            outside.update(id(parameter) for parameter in module.parameters(recurse=False))
            left.extend(module.children())
    uses.update(outside)
    return {key for key, count in uses.items() if count > 1}


def _find(
    module: nn.Module, name: str, inputs: tuple[tuple[Any, ...], dict[str, Any]], shared: set[int]
) -> LayerProjections:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    with torch.enable_grad():
        tensors = _attention_tensors(module, inputs)
        queries, keys = (_rows_by_head(tensors[kind], parameters) for kind in ("queries", "keys"))

    def shared_of(by_head: list[list[Rows]]) -> list[str]:
        found = dict.fromkeys(id(rows.parameter) for part in by_head for rows in part)
        return [names[key] for key in found if key in shared]

    return LayerProjections(
        module, name, queries, keys, {"queries": shared_of(queries), "keys": shared_of(keys)}, inputs
    )


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
                if len(indices[dim]):
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
    """Return the dimension along which no two heads touch the same indices, or None; where there are several,
    as with one head, that with most indices untouched."""
    untouched: dict[int, float] = {}
    for dim, size in enumerate(shape):
        counts = torch.zeros(size, dtype=torch.int64)
        for indices in by_head:
            counts[indices[dim].cpu()] += 1
        if counts.max() == 1:
            untouched[dim] = (counts == 0).double().mean().item()
    return max(untouched, key=lambda dim: untouched[dim], default=None)


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Give each of the parameters once, and what it held back afterwards."""
    unique = list({id(parameter): parameter for parameter in parameters}.values())
    copies = [parameter.detach().clone() for parameter in unique]
    try:
        yield unique
    finally:
        for parameter, copy in zip(unique, copies, strict=True):
            parameter.copy_(copy)


def _add_noise(parameters: Sequence[nn.Parameter]) -> None:
    """Add normal noise as large as what each parameter holds."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        size = parameter.float().square().mean().sqrt().item() or _NOISE
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def _is_close(found: Tensor, wanted: Tensor, tolerance: float = _TOLERANCE) -> bool:
    error = (found.float() - wanted.float()).abs().amax()
    return bool(error <= tolerance * wanted.float().abs().amax())


class _Recorder:
    """A listener that keeps the tensors of one layer's last call, and the layers that called."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = module
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}

    def hears(self, module: nn.Module) -> bool:
        return self._module is None or module is self._module

    def on_call(self, call: AttentionCall) -> None:
        self.modules[id(call.module)] = call.module
        self.tensors = {"queries": call.q, "keys": call.k}
        if isinstance(value := call.options.get("value"), Tensor):
            self.tensors["values"] = value


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[_Recorder]:
    listen(recorder)
    try:
        yield recorder
    finally:
        stop_listening(recorder)


def _attention_tensors(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, Tensor]:
    """Run an attention layer alone; return its queries, keys and values, (1, heads, tokens, head_dim)."""
    args, options = inputs
    with _recording(_Recorder(module)) as recorder:
        module(*args, **options)
    assert recorder.tensors
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
