"""What differs between the model families: names of the parts, and where transformers must be led to our attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from common.model.attention import ATTENTION_NAME, current_pass, paged_attention

AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *arguments, **options: None)


def _as_is(base: Any, first_layer: int) -> None:
    pass


def _adapt_gpt2(base: Any, first_layer: int) -> None:
    """Its optional scaling by layer counts from the stage's first layer: count from the model's."""
    if base.config.scale_attn_by_inverse_layer_idx:
        for local_layer, block in enumerate(base.h):
            block.attn.scaling *= (local_layer + 1) / (first_layer + local_layer + 1)


def _adapt_bloom(base: Any, first_layer: int) -> None:
    """Its attention does not go through transformers' attention interface: replace it."""

    def forward(self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        fused = self.query_key_value(hidden_states)[0].unflatten(-1, (self.num_heads, 3, self.head_dim))
        query, key, value = fused.unbind(2)
        attended = current_pass.get().attend(self.layer_idx, query, key, value, self.inv_norm_factor)
        return residual + self.dense(attended.reshape(hidden_states.shape)), None

    for block in base.h:
        block.self_attention.forward = forward.__get__(block.self_attention)
    base.config._attn_implementation = ATTENTION_NAME


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of the parts below the base model: `embeddings` belong to the first stage, `finals` to the last. Where
    another stage has it, a part of `added` is a term that was added already, one of `optional` is None, and the others
    pass their input on."""

    embeddings: tuple[str, ...]
    finals: tuple[str, ...]
    added: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    adapt: Callable[[Any, int], None] = _as_is
    """Called with (base model, first layer) once the weights are loaded."""
    has_alibi: bool = False
    is_fusible: bool = False
    """Whether its layers are of the kind that `fused` knows."""


_LLAMA = Family(("embed_tokens",), ("norm",), is_fusible=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Family(("embed_in",), ("final_layer_norm",)),
    "gpt2": Family(("wte", "wpe"), ("ln_f",), added=("wpe",), adapt=_adapt_gpt2),
    "bloom": Family(("word_embeddings", "word_embeddings_layernorm"), ("ln_f",), adapt=_adapt_bloom, has_alibi=True),
    "opt": Family(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        ("decoder.final_layer_norm", "decoder.project_out"),
        added=("decoder.embed_positions",),
        optional=("decoder.project_in", "decoder.final_layer_norm", "decoder.project_out"),
    ),
}


class Zero(nn.Module):
    """Stands for a term that another stage has added."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return torch.zeros(())


def drop_parts(base: Any, family: Family, is_first: bool, is_last: bool) -> None:
    """Takes out of the base model what other stages own."""
    for path in (() if is_first else family.embeddings) + (() if is_last else family.finals):
        owner, _, name = path.rpartition(".")
        parent = functools.reduce(getattr, owner.split("."), base) if owner else base
        if path in family.optional:
            setattr(parent, name, None)
        else:
            setattr(parent, name, Zero() if path in family.added else nn.Identity())


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads], float32: geometric from 2^-(8/n) for the largest power of two n <= num_heads, the odd steps of the
    next finer series for the rest."""
    power = 1 << (num_heads.bit_length() - 1)
    coarse = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    fine = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(coarse + fine)
