"""`LogitMonitor`: measurement of the attention logits of a Hugging Face decoder in its own passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longshort.checks import require_integer
from longshort.huggingface.calls import layout_visibility, visibility_of, windows_of
from longshort.huggingface.dispatch import AttentionCall, layer_name, listen, stop_listening
from longshort.huggingface.head_statistics import HeadStatistics, measure
from longshort.huggingface.interface import CONTEXT
from longshort.layers import LongShortAttention, Observation
from longshort.stability import Reading
from longshort.stability.ranks import max_over_ranks, sum_over_ranks

if TYPE_CHECKING:
    from types import TracebackType


class LogitMonitor:
    """A monitor of a decoder's attention logits, by layer and query head, in the passes that it makes anyway.

    It reads the queries and keys of each layer as they reach its attention, whatever the attention
    implementation (eager, sdpa, flash attention, flex_attention, longshort), and the visible pairs of that
    implementation. The numbers are exact: all logits are computed a second time, in tiles and so in linear
    memory.

    Outputs, losses and gradients of the model are bit for bit the same without it (under `torch.compile`,
    which then compiles another graph, up to rounding). Passes that are recomputed in the
    backward pass (gradient checkpointing) give the same numbers again, which changes neither the maxima nor
    the means. Nothing of the model is changed; several monitors can watch it at once.

        with LogitMonitor(model, every=10) as monitor:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                reading = monitor.step()  # a Reading of steps 1, 10, 20, ...; else None

    or, for all passes together:

        with LogitMonitor(model) as monitor:
            model(input_ids)
        print(monitor.reading().max_logit_by_head)

    Args:
        model: a decoder of transformers, also inside PEFT, DDP or FSDP, or compiled. Of a model that also
            sees or hears, the decoder of its text is watched.
        every: measure step 1 and each step with a number that is divisible by it; `step` counts them.
        group: processes whose passes count together; None: all those of torch.distributed, if there are
            others. A reading then has the maxima and means over all of them, and each must ask for it.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: every is not an integer >= 1.
    """

    def __init__(self, model: nn.Module, every: int = 1, *, group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        require_integer("every", every, minimum=1)
        self._model_name = type(model).__name__
        self._every, self._group = every, group
        decoder = decoder_of(model)
        modules = dict(decoder.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        self._modules = list(modules.values())  # keeps the identities in use
        self._candidates = _attention_modules(decoder)
        self._sums: dict[int, _LayerSums] = {}  # by identity of the layer
        self._ran: set[int] = set()
        self._steps = 0
        self._is_entered = self._is_on = False
        self._undo: list[Callable[[], Any]] = []
        weakref.finalize(self, _call_all, self._undo)  # a monitor that is dropped leaves the model alone

    def __enter__(self) -> LogitMonitor:
        """Watch from now on.

        Raises:
            RuntimeError: the monitor is watching already.
        """
        if self._is_entered:
            raise RuntimeError("this LogitMonitor is watching already; make another one")
        self._is_entered = True
        self._switch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, also after an error; the measurements stay."""
        self._is_entered = False
        self._switch()

    def step(self) -> Reading | None:
        """Count a step, after its passes; return its reading if it was measured, else None.

        Raises:
            RuntimeError: as `reading`.
        """
        was_due = self._is_due
        self._steps += 1
        try:
            return self.reading() if was_due else None
        finally:
            self._switch()

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers that were observed since the last reading, in the order of a reading."""
        return [self._names[key] for key in self._observed()]

    def hears(self, module: nn.Module) -> bool:
        """Return whether a layer belongs to the decoder that is watched."""
        return id(module) in self._names

    def on_call(self, call: AttentionCall) -> None:
        """Measure a call of a layer's attention.

        Raises:
            ValueError: the layer attends across ranks, of which each has a part of the keys alone.
        """
        if hasattr(call.module, CONTEXT):
            raise ValueError(
                f"{call.name} attends to a sequence cut across ranks, of which a LogitMonitor sees a part"
            )
        found = call.findings.get("statistics")
        if found is None:
            scale, softcap = call.options.get("scaling"), call.options.get("softcap")
            scale = call.q.shape[3] ** -0.5 if scale is None else float(scale)
            found = measure(call.q, call.k, visibility_of(call), scale, softcap)
            call.findings["statistics"] = found
        self.add(call.module, windows_of(call), found)

    def reading(self) -> Reading:
        """Return the measurements since the last reading, and clear them.

        Layers are those that attended, in the order of the decoder's modules; layers without attention are
        left out. Heads of a layer with a sliding window count as local.

        Raises:
            RuntimeError: nothing was observed; or a layer attended in a way that cannot be observed, or with
                other numbers of heads in other processes; then in all processes.
        """
        order = self._observed()
        missed = [self._names[id(module)] for module in self._missed()]
        try:
            sums = [self._sums[key] for key in order]
            is_shared = self._is_shared()
            if is_shared:
                self._require_same_layers(order, missed)
            if missed:
                raise RuntimeError(_missed_message(missed))
            if not sums:
                raise RuntimeError(
                    f"no attention of {self._model_name} was observed since the last reading; a model whose "
                    "layers do not look up their attention in transformers' AttentionInterface cannot be "
                    "watched"
                )
            return _assemble(sums, self._group if is_shared else False)
        finally:
            self._sums.clear()
            self._ran.clear()

    @property
    def _is_due(self) -> bool:
        number = self._steps + 1
        return number == 1 or number % self._every == 0

    def _switch(self) -> None:
        is_on = self._is_entered and self._is_due
        if is_on and not self._is_on:
            self._start()
        elif self._is_on and not is_on:
            self._stop()
        self._is_on = is_on

    def _start(self) -> None:
        for module in self._candidates:
            note: Any = torch.compiler.disable(partial(_note_run, self._ran))
            self._undo.append(module.register_forward_pre_hook(note).remove)
            if isinstance(module, LongShortAttention):
                observer: Any = torch.compiler.disable(partial(_observe, weakref.ref(self), module))
                module.add_observer(observer)
                self._undo.append(partial(module.remove_observer, observer))
        listen(self)

    def _stop(self) -> None:
        stop_listening(self)
        _call_all(self._undo)

    def add(self, module: nn.Module, windows: tuple[int | None, ...], found: HeadStatistics) -> None:
        """Take note of the statistics of a call by a layer."""
        sums = self._sums.get(id(module))
        if sums is None:
            sums = self._sums[id(module)] = _LayerSums(windows, found)
        elif len(sums.windows) != len(windows):
            raise ValueError(
                f"{layer_name(module)} must attend with as many heads in each call to be watched, got "
                f"{len(sums.windows)} and {len(windows)}"
            )
        sums.add(found)

    def _observed(self) -> list[int]:
        return [key for key in self._names if key in self._sums]

    def _missed(self) -> list[nn.Module]:
        """The layers that ran, but whose attention was not observed."""
        # A compiled graph does not call hooks that are newer than itself: all layers count as run then.
        hooks_work = self._ran.issuperset(key for key in self._sums if key in map(id, self._candidates))
        return [
            module
            for module in self._candidates
            if id(module) not in self._sums and (not hooks_work or id(module) in self._ran)
        ]

    def _is_shared(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1

    def _require_same_layers(self, order: list[int], missed: list[str]) -> None:
        """Let all processes fail together; some would wait for the others otherwise."""
        device = next((x.device for module in self._modules for x in module.parameters(recurse=False)), None)
        places = {key: place for place, key in enumerate(self._names)}
        heads = torch.zeros(len(places), dtype=torch.float64, device=device)
        for key in order:
            heads[places[key]] = len(self._sums[key].windows)
        is_missed = torch.zeros_like(heads)
        by_name = {name: places[key] for key, name in self._names.items()}
        is_missed[[by_name[name] for name in missed]] = 1
        most = max_over_ranks(torch.stack([heads, -heads, is_missed]), self._group)
        elsewhere = [name for name, place in by_name.items() if most[2, place] > 0]
        if elsewhere:
            raise RuntimeError(_missed_message(elsewhere))
        unequal = [name for name, place in by_name.items() if most[0, place] != -most[1, place]]
        if unequal:
            raise RuntimeError(
                f"all processes must observe the same layers, with equal numbers of heads, got others in "
                f"{unequal}"
            )


class _LayerSums:
    """The measurements of one layer over several passes."""

    def __init__(self, windows: tuple[int | None, ...], like: HeadStatistics) -> None:
        self.windows = windows
        self.maxima = torch.zeros_like(torch.stack([like.max_logit, like.row_range]), dtype=torch.float64)
        self.entropies = torch.zeros_like(like.rows)  # summed over rows
        self.rows = torch.zeros_like(like.rows)

    def add(self, found: HeadStatistics) -> None:
        new = torch.stack([found.max_logit, found.row_range]).double()
        self.maxima = torch.maximum(self.maxima, new)
        self.entropies = self.entropies + found.entropy * found.rows
        self.rows = self.rows + found.rows


def _note_run(ran: set[int], module: nn.Module, _: Any) -> None:
    ran.add(id(module))


def _observe(
    monitor: weakref.ref[LogitMonitor], module: LongShortAttention, observation: Observation
) -> None:
    watching = monitor()
    if watching is not None:
        q, k, softcap = observation.q, observation.k, observation.options.get("softcap")
        found = measure(q, k, layout_visibility(observation, module.layout), q.shape[3] ** -0.5, softcap)
        watching.add(module, module.layout.windows, found)


def _call_all(functions: list[Callable[[], Any]]) -> None:
    while functions:
        functions.pop()()


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a model of transformers, or the model itself if it has none."""
    inner = getattr(model, "module", None)  # DDP
    model = inner if isinstance(inner, nn.Module) else model
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    if isinstance(decoder, nn.Module) and any(map(_is_named_attention, decoder.modules())):
        return decoder
    return model  # a layer that is called decoder may be a mere projection


def _attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """Return the modules that attend, by their names: the innermost "Attention" or "Attn" with weights.

    Those of layers that the config calls linear do not: they have no logits of pairs.
    """
    kinds = getattr(getattr(decoder, "config", None), "layer_types", None)
    named = [module for module in decoder.modules() if _is_named_attention(module)]
    return [
        module
        for module in named
        if not any(child is not module and _is_named_attention(child) for child in module.modules())
        and not _is_linear(module, kinds)
    ]


def _is_named_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    is_named = "attention" in kind or "attn" in kind
    return is_named and not kind.endswith("layer") and any(p.ndim > 1 for p in module.parameters())


def _is_linear(module: nn.Module, kinds: Any) -> bool:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(kinds, list | tuple) or not isinstance(layer, int):
        return False
    return layer < len(kinds) and "linear" in str(kinds[layer])


def _missed_message(names: list[str]) -> str:
    return (
        f"the attention of {', '.join(names)} ran but was not observed: it does not look up its attention in "
        "transformers' AttentionInterface, or its own code replaces what is found there"
    )


def _assemble(layers: list[_LayerSums], group: dist.ProcessGroup | bool | None) -> Reading:
    """Make a reading, over the processes of a group; False: of this process alone."""
    device = layers[0].maxima.device
    maxima = torch.cat([layer.maxima.to(device) for layer in layers], dim=1)
    sums = torch.cat([layer.entropies.to(device) for layer in layers])
    rows = torch.cat([layer.rows.to(device) for layer in layers])
    totals = torch.stack([sums, rows])
    if not isinstance(group, bool):
        maxima, totals = max_over_ranks(maxima, group), sum_over_ranks(totals, group)
    (logits, ranges), entropies = maxima.cpu(), (totals[0] / totals[1].clamp_min(1)).cpu()
    is_local = torch.tensor([window is not None for layer in layers for window in layer.windows])
    heads = [len(layer.windows) for layer in layers]

    def by_head(values: Tensor) -> list[list[float]]:
        return [part.tolist() for part in values.split(heads)]

    return Reading(
        max_logit_by_head=by_head(logits),
        entropy_by_head=by_head(entropies),
        max_logit=logits.amax().item(),
        max_logit_local=_largest(logits[is_local]),
        max_logit_global=_largest(logits[~is_local]),
        max_logit_global_in_band=None,
        row_range=ranges.amax().item(),
        row_range_local=_largest(ranges[is_local]),
        row_range_global=_largest(ranges[~is_local]),
        row_range_global_in_band=None,
        row_range_by_head=by_head(ranges),
    )


def _largest(values: Tensor) -> float | None:
    return values.amax().item() if values.numel() else None
