"""What tensors are called in checkpoints and in transformers' modules (no torch)."""

from __future__ import annotations

import functools
import re

LAYER_KEY = re.compile(r"^((?:[a-z_]+\.)*?(?:h|layers)\.)(\d+)\.")
"""The name of a tensor of a layer: what is before its number, and the number."""
PREFIXES = {
    "bloom": "transformer",
    "gpt2": "transformer",
    "gpt_neox": "gpt_neox",
    "llama": "model",
    "mistral": "model",
    "mixtral": "model",
    "opt": "model",
    "qwen2": "model",
    "qwen3": "model",
}
"""The name of the base model, which checkpoints of it alone leave out."""
_RENAMED = (("embed_out.", "lm_head."), (".block_sparse_moe.", ".mlp."))
"""Names that differ between checkpoints and transformers' modules."""


def in_modules(key: str) -> str:
    """What transformers' modules call a tensor of a checkpoint."""
    return functools.reduce(lambda name, pair: name.replace(*pair), _RENAMED, key)


def rename(key: str, prefix: str) -> str:
    """A tensor's name below the base model."""
    return in_modules(key).removeprefix(f"{prefix}.")
