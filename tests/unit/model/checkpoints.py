"""Tiny random checkpoints of every family that can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

NUM_LAYERS = 4
VOCAB_SIZE = 128

_SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
_LLAMA = _SHARED | {"intermediate_size": 96, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 4, "vocab_size": VOCAB_SIZE, "n_positions": 256}
_OPT = _SHARED | {"ffn_dim": 128}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-tied": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama-stray-window": LlamaConfig(**_LLAMA, sliding_window=24),
    "llama-odd-sizes": LlamaConfig(**_LLAMA | {"intermediate_size": 90, "attention_bias": True}, head_dim=24),
    "mistral-window": MistralConfig(**_LLAMA, sliding_window=24),
    "mistral": MistralConfig(**_LLAMA, sliding_window=None),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen2-some-windows": Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=20, max_window_layers=2),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=64),
    "gpt_neox": GPTNeoXConfig(**_SHARED, intermediate_size=128),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2-inverse-layer": GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True),
    "bloom": BloomConfig(hidden_size=64, n_layer=NUM_LAYERS, n_head=4, vocab_size=VOCAB_SIZE),
    "opt": OPTConfig(**_OPT, word_embed_proj_dim=128),
    "opt-projected": OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
}


def save_checkpoint(name: str, folder: Path, shard_size: str = "60KB") -> Any:
    """Writes a random checkpoint of a family, sharded; returns the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # norms and biases too: a fresh model's are ones and zeros, which hide mistakes
            parameter.normal_(0, 0.12) if parameter.dim() >= 2 else parameter.add_(torch.randn(parameter.shape) / 8)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def change_config(folder: Path, **changes: object) -> None:
    """A change to None takes the field out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
