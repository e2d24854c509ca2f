"""A GPT-2-like decoder with LS-attention, without its head, as a Hugging Face model."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from longshort.attention import require_tensor
from longshort.convolution import ShortConvolution
from longshort.huggingface import SplitCache, layer_caches, push_to_hub, write_model_card
from longshort.huggingface.cache_name import CACHE_NAME, given_cache
from longshort.layers import LongShortAttention, Rotary, require_position_ids
from longshort.layout import HeadLayout
from longshort.model.config import LongShortConfig
from longshort.model.consistency import require_own_config
from longshort.model.inputs import check_range, segments_and_positions
from longshort.projection import project

if TYPE_CHECKING:
    from jaxtyping import Float, Int


_HUB_OPTIONS = (
    "repo_id", "private", "token", "commit_message", "commit_description", "revision", "create_pr", "tags"
)  # fmt: skip
# Marks the projections whose output is added to the residual stream; they start smaller.
_ENDS_BRANCH = "ends_residual_branch"


class LongShortMLP(nn.Module):
    """Linear, exact (erf) GELU, linear; no biases."""

    def __init__(self, config: LongShortConfig) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return project(self.down_proj, F.gelu(project(self.up_proj, hidden_states)))


class LongShortBlock(GradientCheckpointingLayer):
    """Pre-LayerNorm attention and MLP, each added to the residual stream."""

    def __init__(self, config: LongShortConfig, layout: HeadLayout, positions: list[str]) -> None:
        super().__init__()
        self.attention_norm = _layer_norm(config)
        self.attention = _attention(config, layout, positions)
        self.mlp_norm = _layer_norm(config)
        self.mlp = LongShortMLP(config)
        for projection in (self.attention.o_proj, self.mlp.down_proj):
            setattr(projection, _ENDS_BRANCH, True)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch q_len hidden"],
        segment_ids: Int[Tensor, "batch kv_len"] | None,
        position_ids: Int[Tensor, "batch q_len"] | None,
        cache: Any,
    ) -> Float[Tensor, "batch q_len hidden"]:
        hidden_states = hidden_states + self.attention(
            self.attention_norm(hidden_states), segment_ids, position_ids, cache
        )
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class LongShortPreTrainedModel(PreTrainedModel):
    """The base of both models: how they are initialised, loaded and checkpointed."""

    config: LongShortConfig
    config_class = LongShortConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LongShortBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]

    def new_cache(self, rollback: int = 0, max_length: int | None = None) -> SplitCache:
        """Return an empty cache for the layouts of this model's layers; see `SplitCache`."""
        return SplitCache(_layouts(self.base_model.layers), rollback, max_length)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        model_card: bool = True,
        **options: Any,
    ) -> None:
        """Save config and weights, as every Hugging Face model does, and a model card.

        Args:
            save_directory, is_main_process, args, options: as for every Hugging Face model.
            push_to_hub: afterwards, upload the model as `push_to_hub` does, to the repository `repo_id`, or
                one with the name of the folder.
            model_card: write README.md too, unless a user's is there; see
                `longshort.huggingface.write_model_card`.

        Raises:
            ValueError: the config does not describe this model, since one of them was changed: loading would
                not restore what was saved.
        """
        require_own_config(self)
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options} if push_to_hub else {}
        super().save_pretrained(save_directory, is_main_process, *args, **options)
        if not self.should_save_on_this_rank(is_main_process):
            return
        if model_card and os.path.isfile(os.path.join(save_directory, "config.json")):  # else adapters alone
            write_model_card(self, os.fspath(save_directory))
        if push_to_hub:
            hub.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(**hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model and its card to the Hugging Face Hub; see `longshort.huggingface.push_to_hub`."""
        return push_to_hub(self, repo_id, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, initializer_range²); those of projections that end a residual branch are
        divided by sqrt(2·layers), so that the stream's variance does not grow with depth (GPT-2)."""
        std = self.initial_std(module)
        if std is not None:
            init.normal_(module.weight, mean=0.0, std=std)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.identity())
        elif isinstance(module, LongShortAttention):
            module.reset_buffers()
            if module.sink_logits is not None:
                init.zeros_(module.sink_logits)

    def initial_std(self, module: nn.Module) -> float | None:
        """Return the standard deviation of a module's initial weights; None if they are not random."""
        if not isinstance(module, nn.Linear | nn.Embedding):
            return None
        std = self.config.initializer_range
        return std / (2 * self.config.num_hidden_layers) ** 0.5 if hasattr(module, _ENDS_BRANCH) else std


def prefill_limit(device_type: str) -> int:
    """Return the default of `LongShortModel.prefill_bytes`: 32 MiB of activations on a CPU, which nearly fit
    its caches, and 512 MiB elsewhere."""
    return 2**25 if device_type == "cpu" else 2**29


class LongShortModel(LongShortPreTrainedModel):
    """The decoder without its head.

    Attributes:
        prefill_bytes: bytes of activations; without gradients, a prompt that would take more passes through
            the layers in chunks, with the same result. None: `prefill_limit`.
    """

    prefill_bytes: int | None = None

    def __init__(self, config: LongShortConfig) -> None:
        super().__init__(config)
        config.check()
        positions = config.head_position_embeddings()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if any("learned" in layer for layer in positions)
            else None
        )
        self.layers = nn.ModuleList(
            LongShortBlock(config, *layer) for layer in zip(config.head_layouts(), positions, strict=True)
        )
        self.norm = _layer_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch q_len"] | None = None,
        attention_mask: Int[Tensor, "batch kv_len"] | None = None,
        position_ids: Int[Tensor, "batch q_len"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch q_len hidden"] | None = None,
        segment_ids: Int[Tensor, "batch kv_len"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        states_to_keep: int = 0,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states after the last block and the final norm.

        Arguments and errors are those of `LongShortForCausalLM.forward`. `hidden_states` of the output holds
        the embeddings and the output of each block, with the final hidden states in place of the last one.
        Hidden states are returned for at least the last `states_to_keep` positions, or for all if it is 0.
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                "output_attentions must be false: no attention matrix is ever held; set the observer of a "
                "LongShortAttention layer to see what goes into it"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        tokens = self._checked(input_ids, inputs_embeds)
        cache = self._cache_to_use(given_cache(cache, past_key_values), use_cache)
        caches = None if cache is None else self._layer_caches(cache)
        past = 0 if caches is None else caches[0].begins_at(tokens.shape[1])
        max_length = None if cache is None else cache.get_max_length(0)
        self._check_positions(position_ids, past, tokens)
        segment_ids, position_ids = segments_and_positions(
            attention_mask, position_ids, segment_ids, past, tokens, max_length
        )
        all_hidden_states = [] if output_hidden_states else None
        chunk = None
        if caches is not None and not output_hidden_states and not torch.is_grad_enabled():
            chunk = self._chunk_length(tokens, segment_ids)
        if chunk is None:
            embeddings = self._embedded(tokens, position_ids)
            hidden_states = self._through_blocks(
                embeddings, segment_ids, position_ids, caches, all_hidden_states
            )
        else:
            if isinstance(cache, SplitCache):
                cache.expect(past + tokens.shape[1])
            hidden_states = self._through_blocks_in_chunks(
                chunk, tokens, segment_ids, position_ids, caches, past, states_to_keep
            )
        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=None if all_hidden_states is None else tuple(all_hidden_states),
            **named_cache,
        )

    def _layer_caches(self, cache: Cache) -> list[Any]:
        """Return each layer's part of a cache, after a check of the cache's layouts against all layers."""
        blocks = self.layers
        caches = layer_caches(cache, len(blocks))
        if isinstance(cache, SplitCache):
            cache.require_layouts(lambda: _layouts(blocks), owner=blocks)
        return caches

    def _through_blocks(
        self,
        hidden_states: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor,
        caches: list[Any] | None,
        all_hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Apply all blocks and the final norm; the input of each and the result are appended to the list, if
        there is one."""
        for index, block in enumerate(self.layers):
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
            cache = None if caches is None else caches[index]
            hidden_states = block(hidden_states, segment_ids, position_ids, cache)
        hidden_states = self.norm(hidden_states)
        if all_hidden_states is not None:
            all_hidden_states.append(hidden_states)
        return hidden_states

    def _through_blocks_in_chunks(
        self,
        chunk: int,
        tokens: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor,
        caches: list[Any] | None,
        past: int,
        states_to_keep: int,
    ) -> Tensor:
        """Apply `_through_blocks` to `chunk` tokens at a time; return the states of the last chunks, at least
        `states_to_keep` of them, or of all chunks if that is 0."""
        q_len = tokens.shape[1]
        kept = []
        for start in range(0, q_len, chunk):
            end = min(start + chunk, q_len)
            hidden_states = self._through_blocks(
                self._embedded(tokens[:, start:end], position_ids[:, start:end]),
                None if segment_ids is None else segment_ids[:, : past + end],
                position_ids[:, start:end],
                caches,
            )
            if states_to_keep == 0 or end > q_len - states_to_keep:
                kept.append(hidden_states)
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

    def _chunk_length(self, tokens: Tensor, segment_ids: Tensor | None) -> int | None:
        """Return the number of tokens that take about `prefill_bytes` of activations in the layers.

        None is all of them: if they are few enough, if an observer must see all keys, if the cache could not
        keep the sinks of packed sequences, or under `torch.compile`, which would compile anew for each number
        of chunks.
        """
        if torch.compiler.is_compiling():
            return None
        batch, q_len = tokens.shape[:2]
        weight = self.embed_tokens.weight
        block: Any = self.layers[0]
        widths = 2 * block.mlp.width + 6 * weight.shape[1]
        limit = prefill_limit(weight.device.type) if self.prefill_bytes is None else self.prefill_bytes
        longest = max(1, limit // max(1, batch * widths * weight.element_size()))
        if q_len <= longest:  # before all other checks, since this holds for every decoded token
            return None
        layers = [module for module in self.modules() if isinstance(module, LongShortAttention)]
        if any(layer.is_observed for layer in layers):
            return None
        has_sinks = any(layer.layout.sink_tokens for layer in layers)
        if has_sinks and segment_ids is not None and bool((segment_ids > 0).any()):
            return None
        return math.ceil(q_len / math.ceil(q_len / longest))  # chunks of about equal length

    def _embedded(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Return the embeddings of ids, or those given, with learned positions."""
        embeddings = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        return embeddings if self.embed_positions is None else embeddings + self.embed_positions(position_ids)

    def _checked(self, input_ids: Any, inputs_embeds: Any) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        if inputs_embeds is not None:
            require_tensor("inputs_embeds", inputs_embeds)
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.embed_tokens.embedding_dim:
                raise ValueError(
                    "inputs_embeds must be (batch, sequence, hidden_size = "
                    f"{self.embed_tokens.embedding_dim}), "
                    f"got shape {tuple(inputs_embeds.shape)}"
                )
            return inputs_embeds
        require_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "input_ids must be (batch, sequence) of int64 or int32, "
                f"got shape {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if input_ids.device.type == "cpu":  # elsewhere a check of the values would wait for the device
            check_range("input_ids", input_ids, "vocab_size", self.embed_tokens.num_embeddings)
        return input_ids

    def _cache_to_use(self, cache: Any, use_cache: bool | None) -> Cache | None:
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
        block: Any = self.layers[0]
        is_convolved = block.attention.short_convolution is not None
        if is_convolved and (use_cache or cache is not None):
            raise ValueError(
                "use_cache and past_key_values do not go with short_convolution, which keeps no state for "
                "decoding"
            )
        if self.training and self.gradient_checkpointing and (use_cache or cache is not None):
            raise ValueError(
                "use_cache and past_key_values do not go with gradient checkpointing in training: "
                "recomputing a block would append its keys twice"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return self.new_cache() if use_cache and cache is None else cache

    def _check_positions(self, position_ids: Any, past: int | Tensor, tokens: Tensor) -> None:
        batch, q_len = tokens.shape[:2]
        if position_ids is not None:
            require_position_ids(position_ids, batch, q_len, tokens.device)
        if self.embed_positions is None:
            return
        limit = self.embed_positions.num_embeddings
        if position_ids is not None:  # if they restart, there may be more tokens than positions
            check_range("position_ids", position_ids, "max_position_embeddings", limit)
        elif isinstance(past, int) and past + q_len > limit:
            raise ValueError(
                f"a sequence may have max_position_embeddings = {limit} tokens, got {past + q_len}"
            )


def _layouts(blocks: Any) -> list[HeadLayout]:
    return [block.attention.layout for block in blocks]


def _layer_norm(config: LongShortConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=1e-5, bias=False)


def _attention(config: LongShortConfig, layout: HeadLayout, positions: list[str]) -> LongShortAttention:
    heads = layout.num_heads
    rotary = slopes = None
    if "rope" in positions:
        skipped = tuple(head for head, kind in enumerate(positions) if kind != "rope")
        rotary = Rotary(config.rope_theta, skipped)
    if "alibi" in positions:
        slopes = [
            2 ** (-8 * (head + 1) / heads) if kind == "alibi" else 0.0 for head, kind in enumerate(positions)
        ]
    return LongShortAttention(
        config.hidden_size,
        layout,
        config.head_dim,
        config.qk_norm,
        rotary,
        attention_precision=config.attention_precision,
        softcap=config.softcap,
        alibi_slopes=slopes,
        sink_logits=config.sink_logits,
        short_convolution=config.short_convolution,
    )
