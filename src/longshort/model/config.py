"""`LongShortConfig`: shape and heads of a language model, as a Hugging Face config."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from longshort.checks import require_integer, require_positive
from longshort.flash import flash_refusal
from longshort.layers import ATTENTION_PRECISIONS
from longshort.layout import HeadLayout

POSITION_EMBEDDINGS = ("learned", "rope", "alibi", "none")
"""The kinds of positions that a config may name."""


class LongShortConfig(PreTrainedConfig):
    """Config of `LongShortForCausalLM`: a GPT-2-like decoder (pre-LayerNorm, exact GELU, no biases) whose
    heads are local or global. All heads global is the MHSA baseline.

    Like every Hugging Face config, it keeps further keyword arguments as plain attributes.

    Attributes:
        vocab_size: token ids are 0 ... vocab_size - 1.
        hidden_size: width of the hidden states.
        num_hidden_layers: blocks.
        num_attention_heads: query heads per block.
        num_key_value_heads: a divisor of num_attention_heads; None means num_attention_heads.
        head_dim: width of a head, independent of hidden_size; None is hidden_size / num_attention_heads.
        intermediate_size: width of the MLP; None gives the parameter-matched width
            6·hidden_size - (num_attention_heads + num_key_value_heads)·head_dim, with which a block has
            12·hidden_size² weights in its matrices, whatever its heads.
        max_position_embeddings: rows of the learned position table; other kinds of positions have no limit.
        num_global_heads: number of heads that see every earlier token, one for the model or one per layer;
            0 ... num_attention_heads, a multiple of the number of query heads that share a key/value head.
            Global heads come after local ones. None is the smallest number: the query heads of one key/value
            head.
        local_window: tokens that a local head sees, the query's own included, one for the model or one per
            layer; None is 100.
        layouts: instead of both, for each layer a list with the window of each head, None for a global one.
        sink_tokens: number of first tokens of each segment that stay visible to local heads.
        position_embedding: "learned" (absolute, added to the token embeddings), "rope", "alibi" (slope
            2^(-8(h+1)/H) for query head h of H) or "none".
        global_position_embedding: the same for the global heads; None: as the others. Learned positions are
            added to the residual stream that all heads read, so they do not mix with another kind.
        rope_theta: base of the rotary angles.
        attention_precision: see `longshort.layers.ATTENTION_PRECISIONS`.
        softcap: c in z <- c·tanh(z/c) on the attention logits; None: off.
        qk_norm: LayerNorm on queries and keys, per head.
        sink_logits: a learned logit per query head in the softmax's denominator, as in gpt-oss; adds
            num_attention_heads parameters per block.
        short_convolution: kernel size >= 2 of a causal depthwise convolution on queries, keys and values
            (Primer, So et al. 2021); adds short_convolution·(num_attention_heads + 2·num_key_value_heads)·
            head_dim parameters per block. It keeps no state for decoding, so there is no cache. None: off.
        initializer_range: standard deviation of the initial weights; those of the projections back into
            the residual stream are divided by sqrt(2·num_hidden_layers).
        tie_word_embeddings: one matrix for embed_tokens and lm_head.
        use_cache: whether a forward pass outside training returns keys and values by default; None: yes,
            unless there is a short_convolution.
        pad_token_id, bos_token_id, eos_token_id: token ids for `generate()`.

    Raises:
        ValueError: a field is out of its range, or two fields exclude each other; the message names them.
    """

    model_type = "longshort"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 10_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # resolved on construction
    head_dim: int = None  # type: ignore[assignment]  # resolved on construction
    intermediate_size: int = None  # type: ignore[assignment]  # resolved on construction
    max_position_embeddings: int = 8192
    num_global_heads: int | list[int] | None = None
    local_window: int | list[int] | None = None
    layouts: list[list[int | None]] | None = None
    sink_tokens: int = 0
    position_embedding: str = "learned"
    global_position_embedding: str | None = None
    rope_theta: float = 10_000.0
    attention_precision: str = "input"
    softcap: float | None = None
    qk_norm: bool = False
    sink_logits: bool = False
    short_convolution: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = None  # type: ignore[assignment]  # resolved on construction
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_groups()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim is needed: hidden_size {self.hidden_size} is not divisible by "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = self._matched_width()
        if self.layouts is None:
            if self.num_global_heads is None:
                self.num_global_heads = self.num_attention_heads // self.num_key_value_heads
            if self.local_window is None:
                self.local_window = 100
        if self.use_cache is None:
            self.use_cache = self.short_convolution is None
        for name in ("num_global_heads", "local_window", "layouts"):
            setattr(self, name, _as_lists(getattr(self, name)))
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise a ValueError that names the field unless all fields fit together.

        A config checks itself when it is made, and a model checks it again, since attributes may be set.
        """
        self._check_sizes()
        self._check_groups()
        for name in ("head_dim", "intermediate_size"):
            require_integer(name, getattr(self, name), minimum=1)
        for name in ("position_embedding", "global_position_embedding"):
            kind = getattr(self, name)
            if kind not in POSITION_EMBEDDINGS and not (kind is None and name.startswith("global")):
                raise ValueError(f"{name} must be one of {POSITION_EMBEDDINGS}, got {kind!r}")
        if self.attention_precision not in ATTENTION_PRECISIONS:
            raise ValueError(
                f"attention_precision must be one of {ATTENTION_PRECISIONS}, got {self.attention_precision!r}"
            )
        for name in ("qk_norm", "sink_logits", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        require_positive("rope_theta", self.rope_theta)
        require_positive("initializer_range", self.initializer_range)
        if self.softcap is not None:
            require_positive("softcap", self.softcap)
        if self.short_convolution is not None:
            require_integer("short_convolution", self.short_convolution, minimum=2)
            if self.use_cache:
                raise ValueError(
                    "use_cache must be false with short_convolution, which keeps no state for decoding, got "
                    f"true with short_convolution={self.short_convolution}"
                )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            self._check_token_ids(name, getattr(self, name))
        kinds = {kind for layer in self.head_position_embeddings() for kind in layer}
        if "learned" in kinds and len(kinds) > 1:
            raise ValueError(
                "global_position_embedding and position_embedding must both be 'learned' or neither, since "
                "learned positions are added to what all heads read; got "
                f"{self.global_position_embedding!r} and {self.position_embedding!r}"
            )
        if "rope" in kinds and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.attention_precision == "sdpa-bf16":
            self._check_flash()

    def head_layouts(self) -> list[HeadLayout]:
        """Return the layout of each layer's heads.

        Raises:
            ValueError: num_global_heads, local_window, layouts or sink_tokens do not fit; the message names
                the field, and the layer where they differ by layer.
        """
        if self.layouts is not None:
            if self.num_global_heads is not None or self.local_window is not None:
                raise ValueError(
                    "layouts replaces num_global_heads and local_window; give one or the others, got "
                    f"num_global_heads={self.num_global_heads!r} and local_window={self.local_window!r} too"
                )
            return [self._custom_layout(*item) for item in enumerate(self._per_layer("layouts"))]
        pairs = zip(self._per_layer("num_global_heads"), self._per_layer("local_window"), strict=True)
        return [self._split_layout(layer, *pair) for layer, pair in enumerate(pairs)]

    def head_position_embeddings(self) -> list[list[str]]:
        """Return, for each layer, the kind of positions that each query head uses."""
        local_kind = self.position_embedding
        global_kind = self.global_position_embedding or local_kind
        return [
            [global_kind if window is None else local_kind for window in layout.windows]
            for layout in self.head_layouts()
        ]

    def _split_layout(self, layer: int, num_global_heads: Any, local_window: Any) -> HeadLayout:
        heads = self.num_attention_heads
        group_size = heads // self.num_key_value_heads
        require_integer("num_global_heads", num_global_heads, minimum=0)
        require_integer("local_window", local_window, minimum=1)
        if num_global_heads > heads or num_global_heads % group_size:
            raise ValueError(
                f"num_global_heads must be a multiple of the {group_size} query heads that share a key/value "
                f"head and at most num_attention_heads = {heads}, got {num_global_heads} in layer {layer}"
            )
        return HeadLayout.split(
            heads, num_global_heads, local_window, self.num_key_value_heads, self.sink_tokens
        )

    def _custom_layout(self, layer: int, windows: Any) -> HeadLayout:
        if not isinstance(windows, list) or len(windows) != self.num_attention_heads:
            raise ValueError(
                f"layouts[{layer}] must be a list of {self.num_attention_heads} windows, one per query head, "
                f"got {windows!r}"
            )
        try:
            return HeadLayout(tuple(windows), self.num_key_value_heads, self.sink_tokens)
        except ValueError as error:
            raise ValueError(f"layouts[{layer}]: {error}") from None

    def _per_layer(self, name: str) -> list[Any]:
        value = getattr(self, name)
        if not isinstance(value, list):
            if name == "layouts":
                raise ValueError(f"layouts must be a list with one list of windows per layer, got {value!r}")
            return [value] * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name} must have one entry for each of {self.num_hidden_layers} layers, got {len(value)}"
            )
        return value

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings"):
            require_integer(name, getattr(self, name), minimum=1)
        require_integer("sink_tokens", self.sink_tokens, minimum=0)
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), minimum=1)

    def _check_groups(self) -> None:
        require_integer("num_key_value_heads", self.num_key_value_heads, minimum=1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )

    def _check_flash(self) -> None:
        for layout, kinds in zip(self.head_layouts(), self.head_position_embeddings(), strict=True):
            slopes = [float(kind == "alibi") for kind in kinds]
            refused = flash_refusal(layout, self.softcap, slopes, self.sink_logits)
            if refused is not None:
                raise ValueError(refused)

    def _check_token_ids(self, name: str, value: Any) -> None:
        tokens: list[Any] = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for token in tokens if value is not None else []:
            require_integer(name, token, minimum=0)
            if token >= self.vocab_size:
                raise ValueError(f"{name} must be below vocab_size = {self.vocab_size}, got {token}")

    def _matched_width(self) -> int:
        heads = self.num_attention_heads + self.num_key_value_heads
        width = 6 * self.hidden_size - heads * self.head_dim
        if width < 1:
            raise ValueError(
                f"intermediate_size is needed: the parameter-matched width 6·hidden_size - "
                f"(num_attention_heads + num_key_value_heads)·head_dim = "
                f"6·{self.hidden_size} - {heads}·{self.head_dim} is {width}"
            )
        return width


def _as_lists(value: Any) -> Any:
    """Turn tuples into lists, so that a config equals the one that is read back from its JSON."""
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value
