"""Language models with LS-attention for Hugging Face transformers, registered there when this is imported."""

from longshort.extras import require

require("longshort.model", "transformers", "safetensors")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longshort.model.config import POSITION_EMBEDDINGS, LongShortConfig
from longshort.model.costs import (
    Flops,
    decode_flops,
    forward_flops,
    kv_bytes,
    parameter_count,
    prefill_flops,
    training_flops,
)
from longshort.model.decoder import LongShortModel, LongShortPreTrainedModel, prefill_limit
from longshort.model.modeling import LongShortForCausalLM
from longshort.model.planning import LayoutPlan, hybrid_layers, plan_layouts
from longshort.model.presets import PRESETS, preset

AutoConfig.register(LongShortConfig.model_type, LongShortConfig)
AutoModel.register(LongShortConfig, LongShortModel)
AutoModelForCausalLM.register(LongShortConfig, LongShortForCausalLM)

__all__ = [
    "POSITION_EMBEDDINGS",
    "PRESETS",
    "Flops",
    "LayoutPlan",
    "LongShortConfig",
    "LongShortForCausalLM",
    "LongShortModel",
    "LongShortPreTrainedModel",
    "decode_flops",
    "forward_flops",
    "hybrid_layers",
    "kv_bytes",
    "parameter_count",
    "plan_layouts",
    "prefill_flops",
    "prefill_limit",
    "preset",
    "training_flops",
]
