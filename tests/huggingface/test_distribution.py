"""Which decoders of transformers go across ranks: those that mix tokens by attention alone."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from tests.huggingface.decoders import make_decoder

from longshort.distributed import ContextParallel
from longshort.huggingface import apply, distribute


@pytest.fixture
def context(tmp_path: Path) -> Iterator[ContextParallel]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield ContextParallel()
    dist.destroy_process_group()


def _applied(model: Any) -> Any:
    apply(model, num_global_heads=2, window=5)
    return model


def _layers_across_ranks(model: Any) -> int:
    return sum(hasattr(module, "longshort_context") for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_not_refused_for_its_rounding(context, dtype):
    config = hf.MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)  # in float32 other tokens change later logits of this one by more than 8 eps
    model = hf.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim >= 2 else 1.0)
    distribute(_applied(model.to(dtype)), context)
    assert _layers_across_ranks(model) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the smaller one changes logits by less than bf16 rounds
def test_a_decoder_with_short_convolutions_is_refused(context, dtype, scale):
    model = make_decoder("lfm2")
    with torch.no_grad():
        model.model.layers[0].conv.out_proj.weight.mul_(scale)
    _applied(model.to(dtype))
    with pytest.raises(ValueError, match="model must mix tokens by attention alone to go across ranks"):
        distribute(model, context)
    assert _layers_across_ranks(model) == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_trial_leaves_nothing_behind_in_any_grad_mode(context, frozen, mode):
    model, hybrid = (_applied(make_decoder(name).train()) for name in ("llama", "lfm2"))
    model.requires_grad_(not frozen)
    hybrid.requires_grad_(not frozen)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        distribute(model, context)
        with pytest.raises(ValueError, match="by attention alone"):
            distribute(hybrid, context)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    for module in (*model.modules(), *hybrid.modules()):
        assert module.training and not module._forward_hooks
    for parameter in (*model.parameters(), *hybrid.parameters()):
        assert parameter.grad is None and parameter.requires_grad is not frozen


class _Quantizer:
    is_trainable = False


def _quantize(model: Any) -> None:
    model.hf_quantizer = _Quantizer()


def _cut_gradients(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.detach())


def _make_gradients_nan(model: Any) -> None:
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] / 0,))


def _make_gradients_zero(model: Any) -> None:
    model.lm_head.weight.data.zero_()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_quantize, "with weights quantized by _Quantizer; dequantize them"),
        (_cut_gradients, "it has no gradients with respect to its input embeddings"),
        (_make_gradients_nan, "whose gradients are not finite"),
        (_make_gradients_zero, "whose gradients are all 0"),
    ],
)
def test_a_decoder_without_gradients_is_refused(context, change, reason):
    model = _applied(make_decoder("llama"))
    change(model)
    with pytest.raises(ValueError, match=reason):
        distribute(model, context)
    assert _layers_across_ranks(model) == 0
