"""Of which type the values of a config.json must be (no torch: transformers knows, but takes seconds to be asked).

A table says it for each family as transformers' own configurations have it; `?` marks what may be null. What a config
leaves out has a default. Whether sizes fit each other and the tensors is judged elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ALL = """
    whole  vocab_size bos_token_id? pad_token_id?
    flag   tie_word_embeddings use_cache
"""
_WIDE = "whole hidden_size num_hidden_layers num_attention_heads max_position_embeddings\n"
_LLAMA = (
    _ALL
    + _WIDE
    + """
    whole  intermediate_size
    text   hidden_act
    real   initializer_range rms_norm_eps
    number attention_dropout
"""
)
_EXPERTS = """
    whole  num_experts_per_tok num_local_experts
    flag   output_router_logits
    real   router_aux_loss_coef router_jitter_noise
"""
_WINDOWS = """
    whole  max_window_layers
    flag   use_sliding_window
"""
_GPT2 = """
    whole  n_embd n_head n_inner? n_layer n_positions
    flag   add_cross_attention reorder_and_upcast_attn scale_attn_by_inverse_layer_idx scale_attn_weights
    flag   summary_proj_to_labels summary_use_proj
    text   activation_function
    real   initializer_range layer_norm_epsilon
    number attn_pdrop embd_pdrop resid_pdrop summary_first_dropout
"""
_BLOOM = """
    whole  hidden_size n_head n_layer pretraining_tp
    flag   apply_residual_connection_post_layernorm slow_but_exact
    real   initializer_range layer_norm_epsilon
    number attention_dropout hidden_dropout
"""
_GPT_NEOX = """
    whole  intermediate_size
    flag   attention_bias is_decoder use_parallel_residual
    text   hidden_act
    real   initializer_range layer_norm_eps
    number attention_dropout classifier_dropout hidden_dropout
"""
_OPT = """
    whole  ffn_dim word_embed_proj_dim?
    flag   _remove_final_layer_norm do_layer_norm_before enable_bias layer_norm_elementwise_affine
    text   activation_function
    real   init_std
    number attention_dropout dropout layerdrop
"""
_TABLES = {
    "bloom": _ALL + _BLOOM,
    "gpt2": _ALL + _GPT2,
    "gpt_neox": _ALL + _WIDE + _GPT_NEOX,
    "llama": _LLAMA + "whole head_dim? num_key_value_heads? pretraining_tp?\nflag attention_bias mlp_bias",
    "mistral": _LLAMA + "whole head_dim? num_key_value_heads sliding_window?",
    "mixtral": _LLAMA + _EXPERTS + "whole head_dim? num_key_value_heads sliding_window?",
    "opt": _ALL + _WIDE + _OPT,
    "qwen2": _LLAMA + _WINDOWS + "whole num_key_value_heads? sliding_window?",
    "qwen3": _LLAMA + _WINDOWS + "whole head_dim num_key_value_heads? sliding_window?\nflag attention_bias",
}
_NULL_TOO = {"llama": ("attention_dropout",)}
"""What may be null in one family alone."""


def is_number(value: object) -> bool:
    """Not so what JSON cannot say and Python reads all the same: NaN and infinity."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "whole": ("a whole number", lambda value: type(value) is int),
    "real": ("a number with a decimal point", lambda value: type(value) is float and is_number(value)),
    "number": ("a number", is_number),
    "flag": ("true or false", lambda value: type(value) is bool),
    "text": ("a text", lambda value: isinstance(value, str)),
}


def wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    """What is of another type than its name, for a config of a known family."""
    family = config["model_type"]
    for name, kind, may_be_null in kinds_of(family):
        if name in config and not (config[name] is None and may_be_null):
            wanted, fits = _KINDS[kind]
            if not fits(config[name]):
                yield f"{name} is {config[name]!r}, where {family} needs {wanted}"


def kinds_of(family: str) -> Iterator[tuple[str, str, bool]]:
    """(name, kind, whether it may be null)"""
    for line in filter(None, map(str.split, _TABLES[family].splitlines())):
        for entry in line[1:]:
            name = entry.removesuffix("?")
            yield name, line[0], entry.endswith("?") or name in _NULL_TOO.get(family, ())
