"""Trial passes of a decoder, which find its layers and refuse those that layouts cannot serve."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils import logging

from longshort.huggingface.cache import SplitCache
from longshort.huggingface.cache_name import CACHE_NAME
from longshort.huggingface.generation import split_cache
from longshort.huggingface.interface import Call, recording, within_sliding_window
from longshort.huggingface.mixers import LayerError, MixerTrial, described, noting_cache_users
from longshort.huggingface.state import NAME, NAMES, stored_state, text_config
from longshort.layout import HeadLayout

_logger = logging.get_logger(__name__)

_TOKENS = 8
_ROUNDING = 1e-4
"""The largest difference of logits that passes for rounding, relative to the largest logit."""
_HALF_ROUNDING = {dtype: 12 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}
"""The same for the outputs of a layer on equal inputs, in half precision; about eps is usual."""


class AttentionLayer(NamedTuple):
    """What a trial pass found of a layer that attends.

    Attributes:
        index: its `layer_idx`.
        name: path of its module in the model.
        num_heads, num_kv_heads: as the attention sees them.
        head_dim, value_dim: of queries and keys, and of values.
        sliding_window: the layer's own window, or None.
        is_chunked: whether the layer sees only keys of the query's own chunk.
    """

    index: int
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None
    is_chunked: bool


def require_dispatch(model: PreTrainedModel, config: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must have its weights, got parameters on the meta device")
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    decoders = [module for module in owners if module.config is config] or [model]
    for decoder in decoders:
        if not decoder._can_set_attn_implementation():
            raise ValueError(
                f"{type(decoder).__name__} cannot attend by layouts: its layers do not dispatch attention "
                "through transformers' AttentionInterface"
            )


def set_implementation(model: PreTrainedModel, config: Any, name: str) -> None:
    """Set the attention implementation of the decoder, not of what else is in the model."""
    if model.config is config:
        model.set_attn_implementation(name)
        return
    keys = [key for key in model.config.sub_configs if getattr(model.config, key) is config]
    model.set_attn_implementation(dict.fromkeys(keys, name))


def own_implementation(config: Any) -> str:
    """Return the attention implementation that layouts replace."""
    state, name = stored_state(config), config._attn_implementation
    if state is not None:
        return state["replaces"]
    return "sdpa" if name in (None, *NAMES) else name


def restore_implementation(model: PreTrainedModel, config: Any) -> None:
    """Set the implementation that layouts replace, or else one that is available."""
    wanted = own_implementation(config)
    for name in dict.fromkeys((wanted, "sdpa", "eager")):
        try:
            set_implementation(model, config, name)
        except (ImportError, ValueError) as error:
            _logger.warning(f"{type(model).__name__} cannot attend by {name!r} here: {error}")
        else:
            return


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Put modes, buffers and random states back after trial passes, for which grad mode is off."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, held in buffers:  # a model may also have put another one in its place
                module._buffers[name] = buffer.copy_(held)


def trial_logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    try:
        output = model(input_ids=ids, **options)
    except ValueError:
        raise
    except Exception as error:  # the model's own code, such as one that needs a mask per query and key
        raise ValueError(f"{type(model).__name__} fails on a trial of {_TOKENS} tokens: {error!r}") from error
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def trial_tokens(model: PreTrainedModel, config: Any) -> Tensor:
    device: Any = model.get_input_embeddings().weight.device
    return torch.arange(3, 3 + _TOKENS, device=device)[None] % config.vocab_size


def try_all_global(model: PreTrainedModel, config: Any) -> list[AttentionLayer]:
    """Attend with all heads global; find the layers, and refuse a model whose logits are others then, or in
    half precision one that has a layer whose outputs are."""
    ids = trial_tokens(model, config)
    implementation = config._attn_implementation
    state = stored_state(config)
    try:
        if implementation in NAMES:
            restore_implementation(model, config)
        config.__dict__.pop(NAME, None)
        model.eval()
        own = config._attn_implementation
        truth = trial_logits(model, ids, use_cache=False)
        set_implementation(model, config, NAME)
        calls, logits = _recorded(model, ids)
        layers = _checked_layers(model, config, calls)
        how, bound = "with all heads global", _half_rounding(model)
        if bound is None:
            _require_alike(how, logits, truth)
        else:
            trial = MixerTrial({call.module: _path(model, call.module) for call in calls}, bound)
            set_implementation(model, config, own)
            with trial.recording():
                trial_logits(model, ids, use_cache=False)
            set_implementation(model, config, NAME)
            with trial.comparing(how):
                _recorded(model, ids)
        model.train()
        for call in _recorded(model, ids)[0]:
            if call.dropout:
                raise ValueError(
                    f"{_path(model, call.module)} drops attention probabilities in training "
                    f"(p = {call.dropout}), which layouts do not support; set attention_dropout to 0"
                )
    finally:
        set_implementation(model, config, implementation)
        if state is not None:
            setattr(config, NAME, state)
    return layers


def _recorded(model: PreTrainedModel, ids: Tensor) -> tuple[list[Call], Tensor]:
    """The calls of attention in one pass with all heads global, and the logits."""
    calls: list[Call] = []

    modules = {id(module) for module in model.modules()}

    def all_global(call: Call) -> HeadLayout:
        if id(call.module) not in modules:
            raise ValueError(
                f"{type(model).__name__} cannot attend by layouts: {type(call.module).__name__}, which "
                "attends, is not a part of it"
            )
        calls.append(call)
        layout = HeadLayout((None,) * call.num_heads, call.num_kv_heads)
        return within_sliding_window(layout, call.sliding_window)

    with recording(all_global):
        logits = trial_logits(model, ids, use_cache=False)
    return calls, logits


def _path(model: nn.Module, module: nn.Module) -> str:
    names = {id(found): name for name, found in model.named_modules()}
    return described(names[id(module)], module)


def _checked_layers(model: PreTrainedModel, config: Any, calls: Sequence[Call]) -> list[AttentionLayer]:
    if not calls:
        raise ValueError(
            f"{type(model).__name__} cannot attend by layouts: no layer calls the AttentionInterface"
        )
    kinds, settings = get_layer_types_and_kwargs(config)
    layers: dict[int, AttentionLayer] = {}
    for call in calls:
        path = _path(model, call.module)
        index = getattr(call.module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(kinds):
            raise ValueError(
                f"{path} cannot attend by a layout: it has layer_idx = {index!r}, not one of {len(kinds)}"
            )
        if getattr(call.module, "config", None) is not config:
            raise ValueError(f"{path} cannot attend by a layout: it does not hold the decoder's config")
        if index in layers:
            raise ValueError(f"{path} cannot attend by a layout: layer {index} attends more than once")
        if "sliding" in kinds[index] and call.sliding_window is None:
            raise ValueError(
                f"{path} cannot attend by a layout: by the config its sliding window is "
                f"{settings[index].get('sliding_window')}, which it does not pass to the attention"
            )
        layers[index] = AttentionLayer(
            index, path, call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim,
            call.sliding_window, is_chunked="chunked" in kinds[index],
        )  # fmt: skip
    return [layers[index] for index in sorted(layers)]


def cache_refusal(layers: Sequence[AttentionLayer]) -> str | None:
    for layer in layers:
        if layer.head_dim != layer.value_dim:
            return (
                f"{layer.name} has keys of head_dim {layer.head_dim} and values of {layer.value_dim}, as "
                "multi-head latent attention has them, whose cache holds no heads"
            )
    return None


def try_with_caches(model: PreTrainedModel) -> str | None:
    """Refuse a model whose logits, or in half precision the outputs of whose layers, depend on whether keys
    are cached, and how.

    Returns:
        Why a `SplitCache` cannot serve the model; None if it can.
    """
    config = text_config(model)
    ids = trial_tokens(model, config)
    model.eval()
    trial = None
    bound = _half_rounding(model)
    if bound is not None:
        with suppress(ValueError), noting_cache_users(model) as users:  # the error will come again
            trial_logits(model, ids, use_cache=True, **{CACHE_NAME: DynamicCache(config=config)})
        trial = MixerTrial(users, bound)
    with nullcontext() if trial is None else trial.recording():
        truth = trial_logits(model, ids, use_cache=False)
    caches: dict[str, Cache] = {"with a DynamicCache": DynamicCache(config=config)}
    state = stored_state(config)
    assert state is not None
    refusal = state["cache"]
    if refusal is None:
        caches["with a SplitCache"] = split_cache(model)
    for how, cache in caches.items():
        parts = ids.split([_TOKENS - 3, 1, 2], dim=1)
        with nullcontext() if trial is None else trial.comparing(how):
            try:
                logits = [trial_logits(model, part, use_cache=True, **{CACHE_NAME: cache}) for part in parts]
            except LayerError:
                raise
            except ValueError as error:
                if isinstance(error.__cause__, TypeError) and isinstance(cache, SplitCache):
                    return f"{type(model).__name__} works on keys that come out of the cache"
                raise ValueError(f"{type(model).__name__} cannot attend by layouts {how}: {error}") from error
        if trial is None:
            _require_alike(how, torch.cat(logits, dim=1), truth)
    return refusal


def _half_rounding(model: PreTrainedModel) -> float | None:
    """Return the bound of rounding in a model that computes in half precision; None for other models."""
    bounds = [_HALF_ROUNDING[p.dtype] for p in model.parameters() if p.dtype in _HALF_ROUNDING]
    return max(bounds, default=None)


def _require_alike(how: str, logits: Tensor, truth: Tensor) -> None:
    bound = _ROUNDING * truth.abs().max().item()
    error = (logits - truth).abs().max().item()
    if not error <= bound:
        raise ValueError(
            f"the model cannot attend by layouts: {how} its logits differ by {error:.1e} from what they "
            f"were, more than the {bound:.1e} of rounding"
        )
