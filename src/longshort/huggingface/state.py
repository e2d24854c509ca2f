"""The layouts of a Hugging Face decoder, kept in its config, so that they are saved and loaded with it.

The text config's attribute `longshort` is a dict of plain data: `layouts`, for each layer None or
`{"windows", "num_kv_heads", "sink_tokens"}`; `replaces`, the attention implementation before; and `cache`,
None or the reason why a `SplitCache` cannot serve the model.
"""

from __future__ import annotations

import json
from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

NAME = "longshort"
"""The attention implementation of transformers that attends by layouts, and the config's attribute."""

SAVED_NAME = "longshort (import longshort.huggingface)"
"""The same in config.json."""

NAMES = (NAME, SAVED_NAME)
"""What a model with layouts may call its attention implementation."""


_KINDS = "layer_types"


def text_config(model: nn.Module) -> PreTrainedConfig:
    """Return the config of a model's decoder: a part of the config of a model that also sees or hears."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"model must be a model of transformers with a config, got {type(model).__name__}")
    return config.get_text_config(decoder=True)


def store_layouts(
    config: PreTrainedConfig, layouts: Sequence[HeadLayout | None], replaces: str, cache: str | None
) -> None:
    """Write the layouts of all layers into a decoder's config."""
    setattr(
        config,
        NAME,
        {"layouts": [_as_data(layout) for layout in layouts], "replaces": replaces, "cache": cache},
    )


def stored_state(config: Any) -> dict[str, Any] | None:
    """Return what `store_layouts` wrote, or None."""
    return getattr(config, NAME, None)


def layouts_of(model: nn.Module) -> list[HeadLayout | None] | None:
    """Return the layout of each layer, None for one that does not attend; None if none were applied.

    These are the layouts in the config, even if the caller has since set another attention implementation.
    A layer with a sliding window of its own has windows that are at most as long, and no sink tokens.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: the config's `longshort` is damaged.
    """
    config = text_config(model)
    state = stored_state(config)
    return None if state is None else [layout_from(data) for data in _layers(config, state)]


def layer_data(config: Any, layer: Any) -> Any:
    """Return what the config holds of one layer, for `layout_from`.

    Raises:
        ValueError: the config has no layouts, or not for this layer.
    """
    state = stored_state(config)
    if state is None:
        raise ValueError(
            f"the attention implementation {NAME!r} needs layouts, and this {type(config).__name__} has "
            "none; call longshort.huggingface.apply(model, ...)"
        )
    layers = _layers(config, state)
    if not isinstance(layer, int) or not 0 <= layer < len(layers):
        raise ValueError(f"config.longshort has layouts of {len(layers)} layers, none of layer {layer}")
    return layers[layer]


def _as_data(layout: HeadLayout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    return {
        "windows": list(layout.windows),
        "num_kv_heads": layout.num_kv_heads,
        "sink_tokens": layout.sink_tokens,
    }


def _layers(config: Any, state: Any) -> list[Any]:
    layers = state.get("layouts") if isinstance(state, dict) else None
    if not isinstance(layers, list):
        raise ValueError(
            f"config.longshort of {type(config).__name__} must hold 'layouts', a list, got {state!r}"
        )
    return layers


def layout_from(data: Any) -> HeadLayout | None:
    """Return the layout that the config holds of a layer; None if it holds none.

    Raises:
        ValueError: the data are damaged.
    """
    if data is None:
        return None
    if not isinstance(data, dict) or data.keys() != {"windows", "num_kv_heads", "sink_tokens"}:
        raise ValueError(
            "config.longshort must hold windows, num_kv_heads and sink_tokens for each layer that attends, "
            f"got {data!r}"
        )
    return HeadLayout(tuple(data["windows"]), data["num_kv_heads"], data["sink_tokens"])


def keep_with_config() -> None:
    """Let configs with layouts save and load the attention implementation too, which transformers omits.

    It is saved as `SAVED_NAME`, and so are the kinds of layers. So a model that is loaded without longshort,
    by whatever attention implementation, fails with an error of transformers that quotes this name, and does
    not attend without its windows. Nor does one that is loaded with longshort, but with another attention
    implementation.
    """
    to_dict, to_json_string = PreTrainedConfig.to_dict, PreTrainedConfig.to_json_string
    from_dict = PreTrainedConfig.from_dict.__func__

    @wraps(to_dict)
    def to_dict_with_name(self: PreTrainedConfig) -> dict[str, Any]:
        data = to_dict(self)
        holders = [key for key in self.sub_configs if _holds_layouts(data.get(key))]
        if _holds_layouts(data):
            data["attn_implementation"] = SAVED_NAME
        elif holders:
            data["attn_implementation"] = dict.fromkeys(holders, SAVED_NAME)
        return data

    @wraps(to_json_string)
    def to_json_string_with_name(self: PreTrainedConfig, *args: Any, **options: Any) -> str:
        text = to_json_string(self, *args, **options)
        data = json.loads(text)
        sealed = _mapped(data, _sealed)
        return text if sealed == data else json.dumps(sealed, indent=2, sort_keys=True) + "\n"

    @wraps(from_dict)
    def from_dict_with_name(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **options: Any) -> Any:
        _require_layouts_in_use(config_dict, options.get("attn_implementation"))
        config_dict = _mapped(config_dict, _unsealed)
        saved = config_dict.get("attn_implementation")
        if isinstance(saved, dict) and SAVED_NAME in saved.values():
            names = {key: NAME if name == SAVED_NAME else name for key, name in saved.items()}
            config_dict = {**config_dict, "attn_implementation": names}
        return from_dict(cls, config_dict, **options)

    PreTrainedConfig.to_dict = to_dict_with_name
    PreTrainedConfig.to_json_string = to_json_string_with_name
    PreTrainedConfig.from_dict = classmethod(from_dict_with_name)  # pyright: ignore[reportAttributeAccessIssue]


def _holds_layouts(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get(NAME), dict) and "layouts" in data[NAME]


def _mapped(data: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Copy the data of a config, with those parts changed that hold layouts."""
    if not isinstance(data, dict):
        return data
    data = {key: _mapped(value, change) for key, value in data.items()}
    return change(data) if _holds_layouts(data) else data


def _sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Put the kinds of layers among the layouts, and in their place one that transformers refuses."""
    return {**data, _KINDS: [SAVED_NAME], NAME: {**data[NAME], _KINDS: data.get(_KINDS)}}


def _unsealed(data: dict[str, Any]) -> dict[str, Any]:
    if data.get("attn_implementation") == SAVED_NAME:
        data = {**data, "attn_implementation": NAME}
    if data.get(_KINDS) != [SAVED_NAME]:
        return data
    state = dict(data[NAME])
    kinds = state.pop(_KINDS, None)
    rest = {key: value for key, value in data.items() if key != _KINDS}
    return {**rest, NAME: state} | ({} if kinds is None else {_KINDS: kinds})


def _require_layouts_in_use(data: dict[str, Any], implementation: Any) -> None:
    """Refuse an attention implementation, for all or by the name of a part, that would ignore layouts."""
    holders = [key for key, part in [("", data), *data.items()] if _holds_layouts(part)]
    names = implementation if isinstance(implementation, dict) else dict.fromkeys(holders, implementation)
    for holder in holders:
        name = names.get(holder)
        if name not in (None, *NAMES):
            raise ValueError(
                f"attn_implementation must be {NAME!r} or left out for a model that was saved with layouts, "
                f"got {name!r}, which has no windows; load it without, then call "
                "longshort.huggingface.remove(model) or model.set_attn_implementation"
            )
