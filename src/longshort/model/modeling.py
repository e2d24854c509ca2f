"""A GPT-2-like decoder with LS-attention, as a Hugging Face model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from longshort.attention import require_tensor
from longshort.convolution import ShortConvolution
from longshort.huggingface import LayerCache
from longshort.layers import LongShortAttention, Rotary, require_position_ids
from longshort.layout import HeadLayout, require_integer
from longshort.model.config import LongShortConfig
from longshort.model.inputs import check_labels, check_range, kept, segments_and_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


# Marks the projections whose output is added to the residual stream; they start smaller.
_ENDS_BRANCH = "ends_residual_branch"


class LongShortMLP(nn.Module):
    """Linear, exact (erf) GELU, linear; no biases."""

    def __init__(self, config: LongShortConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


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
        cache: LayerCache | None,
    ) -> Float[Tensor, "batch q_len hidden"]:
        hidden_states = hidden_states + self.attention(
            self.attention_norm(hidden_states), segment_ids, position_ids, cache
        )
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class LongShortPreTrainedModel(PreTrainedModel):
    """What both models share: how they are initialised, loaded and checkpointed."""

    config: LongShortConfig
    config_class = LongShortConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LongShortBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); projections that end a residual branch divided by sqrt(2·layers), so that
        the stream's variance does not grow with depth (GPT-2)."""
        std = self._initial_std(module)
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

    def _initial_std(self, module: nn.Module) -> float | None:
        """Standard deviation of a module's initial weights; None where they are not random."""
        if not isinstance(module, nn.Linear | nn.Embedding):
            return None
        std = self.config.initializer_range
        return std / (2 * self.config.num_hidden_layers) ** 0.5 if hasattr(module, _ENDS_BRANCH) else std


class LongShortModel(LongShortPreTrainedModel):
    """The decoder without its head."""

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
    ) -> BaseModelOutputWithPast:
        """The hidden states after the last block and the final norm.

        Arguments and errors are those of `LongShortForCausalLM.forward`; `hidden_states` of the output holds
        the embeddings, what each block gives, and in place of the last of them the final hidden states.
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                "output_attentions must be false: no attention matrix is ever held; set the observer of a "
                "LongShortAttention layer to see what goes into it"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        inputs_embeds = self._embedded(input_ids, inputs_embeds)
        past_key_values = self._cache_to_use(past_key_values, use_cache)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        self._check_positions(position_ids, past, inputs_embeds)
        segment_ids, position_ids = segments_and_positions(
            attention_mask, position_ids, segment_ids, past, inputs_embeds
        )
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)

        all_hidden_states = [hidden_states]
        for index, block in enumerate(self.layers):
            cache = None if past_key_values is None else LayerCache(past_key_values, index)
            hidden_states = block(hidden_states, segment_ids, position_ids, cache)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        all_hidden_states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def _embedded(self, input_ids: Any, inputs_embeds: Any) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        if inputs_embeds is not None:
            require_tensor("inputs_embeds", inputs_embeds)
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds must be (batch, sequence, hidden_size = {self.config.hidden_size}), "
                    f"got shape {tuple(inputs_embeds.shape)}"
                )
            return inputs_embeds
        require_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "input_ids must be (batch, sequence) of int64 or int32, "
                f"got shape {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if input_ids.device.type == "cpu":  # elsewhere looking at the values would wait for the device
            check_range("input_ids", input_ids, "vocab_size", self.embed_tokens.num_embeddings)
        return self.embed_tokens(input_ids)

    def _cache_to_use(self, past_key_values: Any, use_cache: bool | None) -> Cache | None:
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise TypeError(
                f"past_key_values must be a transformers Cache, got {type(past_key_values).__name__}"
            )
        if self.config.short_convolution is not None and (use_cache or past_key_values is not None):
            raise ValueError(
                "use_cache and past_key_values do not go with short_convolution, which keeps no state for "
                "decoding"
            )
        if self.training and self.gradient_checkpointing and (use_cache or past_key_values is not None):
            raise ValueError(
                "use_cache and past_key_values do not go with gradient checkpointing in training: "
                "recomputing a block would append its keys twice"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return DynamicCache() if use_cache and past_key_values is None else past_key_values

    def _check_positions(self, position_ids: Any, past: int, inputs_embeds: Tensor) -> None:
        batch, q_len, _ = inputs_embeds.shape
        limit = self.config.max_position_embeddings
        if position_ids is not None:
            require_position_ids(position_ids, batch, q_len, inputs_embeds.device)
        if self.embed_positions is None:
            return
        if position_ids is not None:  # restarting ones may serve more tokens than there are positions
            check_range("position_ids", position_ids, "max_position_embeddings", limit)
        elif past + q_len > limit:
            raise ValueError(
                f"a sequence may have max_position_embeddings = {limit} tokens, got {past + q_len}"
            )


class LongShortForCausalLM(LongShortPreTrainedModel, GenerationMixin):
    """The decoder with a linear head over the vocabulary.

    A cache does not remember where packed sequences (`position_ids` that restart) end: who goes on from one
    passes `segment_ids` for all keys.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongShortConfig) -> None:
        super().__init__(config)
        self.model = LongShortModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def draw_weights(self, seed: int) -> None:
        """Draw all matrices and tables anew, those of each module from a random stream of its own.

        The stream is a function of seed and the module's name alone, so that models of which one has modules
        that the other lacks agree bit for bit in all others of equal shape. The distributions are those of a
        new model, drawn on the CPU in fp32; torch's own generators are neither read nor moved. What is not
        random in a new model (gains, sink logits, convolutions) stays as it is.

        Args:
            seed: an integer >= 0.

        Raises:
            ValueError: seed is no such integer.
        """
        require_integer("seed", seed, minimum=0)
        tied = {id(self.lm_head)} if self.config.tie_word_embeddings else set()
        for name, module in self.named_modules():
            std = None if id(module) in tied else self._initial_std(module)
            if std is None:
                continue
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            weight = module.weight
            assert isinstance(weight, Tensor)
            drawn = torch.normal(
                0.0, std, weight.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            weight.copy_(drawn)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch q_len"] | None = None,
        attention_mask: Int[Tensor, "batch kv_len"] | None = None,
        position_ids: Int[Tensor, "batch q_len"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch q_len hidden"] | None = None,
        labels: Int[Tensor, "batch q_len"] | None = None,
        segment_ids: Int[Tensor, "batch kv_len"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token and, with labels, the loss: mean cross-entropy in nats, in fp32.

        Args:
            input_ids: int64 or int32; or else inputs_embeds in the dtype of the parameters.
            attention_mask: 1 for tokens, 0 for padding on either side, cached tokens included. Under
                `torch.compile` leave it out where nothing is padded: there even a mask of ones costs time.
            position_ids: (batch, q_len) or (1, q_len). None: tokens are counted from 0, padding not. Without
                attention from earlier calls, positions that do not count on by 1 start a packed sequence.
            past_key_values: a cache that keeps every token, such as `DynamicCache`; it is appended to.
            labels: the input ids, -100 where nothing is predicted; shifted inside. Their last token has no
                successor and their first no predecessor.
            segment_ids: (batch, kv_len) for packed sequences, instead of restarting position_ids; positions
                go on over their borders.
            use_cache: return keys and values; None: as the config says, but never in training.
            logits_to_keep: so many last positions get logits, 0 for all; or a 1-D tensor of positions.
            output_hidden_states: also return the embeddings and what each block gives.
            output_attentions: must be false, no attention matrix is ever held.
            loss_arguments: `shift_labels` (batch, q_len): entry t is the token that follows input t, -100
                where nothing is predicted; they take the place of labels. `num_items_in_batch`: the loss is
                the sum of the cross-entropies divided by it.

        Raises:
            TypeError: an argument is no tensor or no cache, or is not known.
            ValueError: a value or shape is not allowed; the message names the argument.
        """
        unknown = sorted(loss_arguments.keys() - {"shift_labels", "num_items_in_batch"})
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward got arguments that it does not know: {', '.join(unknown)}; "
                "packed sequences are told by segment_ids or by restarting position_ids"
            )
        shift_labels = loss_arguments.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if has_labels and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        for name, value in (("labels", labels), ("shift_labels", shift_labels)):
            check_labels(name, value, hidden_states)
        logits = self.lm_head(kept(hidden_states, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
                **loss_arguments,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


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
