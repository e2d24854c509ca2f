"""Language models with LS-attention for Hugging Face transformers; importing this registers them there."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longshort.model.config import POSITION_EMBEDDINGS, LongShortConfig
from longshort.model.costs import Flops, forward_flops, kv_bytes, parameter_count, training_flops
from longshort.model.modeling import LongShortForCausalLM, LongShortModel, LongShortPreTrainedModel
from longshort.model.presets import PRESETS, preset

AutoConfig.register(LongShortConfig.model_type, LongShortConfig)
AutoModel.register(LongShortConfig, LongShortModel)
AutoModelForCausalLM.register(LongShortConfig, LongShortForCausalLM)

__all__ = [
    "POSITION_EMBEDDINGS",
    "PRESETS",
    "Flops",
    "LongShortConfig",
    "LongShortForCausalLM",
    "LongShortModel",
    "LongShortPreTrainedModel",
    "forward_flops",
    "kv_bytes",
    "parameter_count",
    "preset",
    "training_flops",
]
