"""Tiny decoders: random ones, and one in which exactly one head needs distant tokens."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from longshort.conversion.heads import KVHead
from longshort.data import byte_tokenizer

SYMBOLS, PLACES, PERIOD = 12, 48, 20
PLANTED, DECOY = KVHead(1, 0), KVHead(0, 1)


def planted_model() -> Any:
    """A model that continues texts of period 20, by one head that looks 19 tokens back.

    A decoy attends to the third token, but gives nothing; the other heads are weak noise.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SYMBOLS, n_positions=PLACES, n_embd=2 * PLACES, n_layer=2, n_head=2, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    places, answer = SYMBOLS, SYMBOLS + PLACES  # where the width holds the position, and the prediction
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.1)
        for block in model.transformer.h:
            block.mlp.c_proj.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(SYMBOLS, 2 * PLACES))
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, places : places + PLACES] = torch.eye(PLACES)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, answer : answer + SYMBOLS] = torch.eye(SYMBOLS)

        planted = model.transformer.h[PLANTED.layer].attn
        weight, width = planted.c_attn.weight, 2 * PLACES  # (width, queries | keys | values)
        start = PLANTED.head * PLACES
        weight[:, start : start + PLACES] = 0
        weight[places : places + PLACES, start : start + PLACES] = 5 * torch.eye(PLACES).roll(
            -(PERIOD - 1), dims=1
        )
        weight[:, width + start : width + start + PLACES] = 0
        weight[places : places + PLACES, width + start : width + start + PLACES] = torch.eye(PLACES)
        weight[:, 2 * width + start : 2 * width + start + PLACES] = 0
        weight[:SYMBOLS, 2 * width + start : 2 * width + start + SYMBOLS] = torch.eye(SYMBOLS)
        planted.c_proj.weight[start : start + PLACES] = 0
        planted.c_proj.weight[start : start + SYMBOLS, answer : answer + SYMBOLS] = 0.5 * torch.eye(SYMBOLS)

        decoy = model.transformer.h[DECOY.layer].attn
        start = DECOY.head * PLACES
        decoy.c_attn.weight[:, start : start + PLACES] = 0
        decoy.c_attn.bias[start] = 10.0
        decoy.c_attn.weight[places + 2, width + start] = 5.0
        decoy.c_proj.weight[start : start + PLACES] = 0
    return model


def periodic_text(count: int, seed: int = 0) -> torch.Tensor:
    """Windows that the planted model can continue: (count, 48)."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(1, SYMBOLS, (count, PERIOD), generator=generator)
    return period.repeat(1, 3)[:, :PLACES]


def random_llama(**changes: object) -> PreTrainedModel:
    """A Llama with grouped queries, and weights large enough to matter."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 256, "eos_token_id": 256,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def save_llama(folder: Path) -> Path:
    """Save a Llama and a tokenizer of bytes."""
    random_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_short_gpt2(folder: Path) -> Path:
    """Save a GPT-2 of 48 learned positions and a tokenizer of bytes."""
    config = GPT2Config(
        vocab_size=257, n_positions=48, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, bos_token_id=256,
        eos_token_id=256,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))
