"""A GPT-2-like language model with LS-attention, as a Hugging Face model with `generate()`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from longshort.checks import require_integer
from longshort.distributed import put_values
from longshort.huggingface.cache_name import CACHE_NAME, given_cache
from longshort.model.config import LongShortConfig
from longshort.model.decoder import LongShortModel, LongShortPreTrainedModel
from longshort.model.inputs import check_labels, kept
from longshort.projection import project

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import GenerationConfig
    from transformers.cache_utils import Cache


class LongShortForCausalLM(LongShortPreTrainedModel, GenerationMixin):
    """The decoder with a linear head over the vocabulary.

    A cache does not remember where packed sequences (`position_ids` that restart) end: to continue them, pass
    `segment_ids` for all keys.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongShortConfig) -> None:
        super().__init__(config)
        self.model = LongShortModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate()` a cache of ours if the caller passed none and asked for no other kind."""
        given = given_cache(*(model_kwargs.pop(name, None) for name in ("cache", "past_key_values")))
        if given is not None:
            model_kwargs[CACHE_NAME] = given
        kind = generation_config.cache_implementation
        is_free = generation_config.use_cache is not False and given is None
        if is_free and kind in (None, "static"):
            longest = None if kind is None else max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs[CACHE_NAME] = self.new_cache(max_length=longest)
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()
            return
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Return the mask that `generate()` needs for a cache of fixed size: the mask of tokens, with entries
        for all that the cache has memory for, so that its shape stays as it is."""
        if attention_mask is None:
            return None
        missing = kwargs[CACHE_NAME].get_max_length(0) - attention_mask.shape[1]
        return F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask

    @torch.no_grad()
    def draw_weights(self, seed: int) -> None:
        """Draw all matrices and tables anew, those of each module from a separate random stream.

        The stream is a function of seed and the module's name alone: if one model has modules that another
        lacks, the two agree bit for bit in all others of equal shape. The distributions are those of a new
        model, drawn on the CPU in fp32, also where FSDP2 has cut the model into shards; torch's own
        generators are neither read nor advanced. Parameters that are not random in a new model (gains, sink
        logits, convolutions) stay as they are.

        Args:
            seed: an integer >= 0.

        Raises:
            ValueError: seed is not such an integer.
        """
        require_integer("seed", seed, minimum=0)
        tied = {id(self.lm_head)} if self.config.tie_word_embeddings else set()
        for name, module in self.named_modules():
            std = None if id(module) in tied else self.initial_std(module)
            if std is None:
                continue
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            weight = module.weight
            assert isinstance(weight, Tensor)
            drawn = torch.normal(
                0.0, std, weight.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            put_values(weight, drawn)

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
        cache: Cache | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the next token and, with labels, the loss: mean cross-entropy in nats, fp32.

        If there is no target at all, since all labels are -100, the mean is NaN, as in every Hugging Face
        model; its gradients are zeros, so that they spoil no accumulated batch.

        Args:
            input_ids: int64 or int32; or else inputs_embeds in the dtype of the parameters.
            attention_mask: 1 for tokens, 0 for padding on either side, cached tokens included; or for as many
                tokens as a cache of fixed size may hold, of which later ones do not count. Under
                `torch.compile` leave it out if nothing is padded: there even a mask of ones costs time.
            position_ids: (batch, q_len) or (1, q_len). None: tokens are counted from 0, without padding.
                Without cached tokens, a position that is 0 or below that of the token before it starts a
                packed sequence. Positions that jump ahead, step by 2 or repeat do not: their tokens see each
                other. If positions do not show the borders, pass `segment_ids`.
            past_key_values: the result of `new_cache`, of this model or of one with equal layouts; or a cache
                that keeps every token, such as `DynamicCache`. It is appended to.
            labels: the input ids, -100 where nothing is predicted; shifted inside, so that the first of them
                and the logits of the last position are not used.
            segment_ids: (batch, kv_len) for packed sequences, instead of restarting position_ids; positions
                then continue over the borders. (batch, max_length) in a step that is compiled or captured
                with a cache of fixed size on a GPU.
            use_cache: return keys and values; None: as the config says, but never in training.
            logits_to_keep: number of last positions that get logits, 0 for all; or a 1-D tensor of positions.
            output_hidden_states: also return the embeddings and the output of each block.
            output_attentions: must be false, since no attention matrix is ever held.
            cache: another name for past_key_values, which transformers uses from 5.24 on.
            loss_arguments: `shift_labels` (batch, q_len): entry t is the token that follows input t, -100
                where nothing is predicted; they replace labels. `num_items_in_batch`: the loss is the sum of
                the cross-entropies divided by it, so 0 if there is no target.

        Raises:
            TypeError: an argument is not a tensor or not a cache, or is not known.
            ValueError: a value or shape is not allowed; the message names the argument.
        """
        unknown = sorted(loss_arguments.keys() - {"shift_labels", "num_items_in_batch"})
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward got arguments that it does not know: {', '.join(unknown)}; "
                "mark packed sequences by segment_ids or by restarting position_ids"
            )
        shift_labels = loss_arguments.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if has_labels and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            states_to_keep=max(0, logits_to_keep) if isinstance(logits_to_keep, int) else 0,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        for name, value in (("labels", labels), ("shift_labels", shift_labels)):
            check_labels(name, value, hidden_states)
        logits = project(self.lm_head, kept(hidden_states, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.lm_head.out_features,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
                **loss_arguments,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
