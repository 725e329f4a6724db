"""Whether the tensors of a checkpoint are those that its config.json asks for (no torch: before anything is started).

A table says what each family's files hold, by name below the base model. `?` marks what some checkpoints of the family
do without, unless their config sets the flag behind it (where the family has that flag). A size that a config leaves to
the family is not judged here: the stages do that, which build the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.model.headers import StoredTensor
from common.model.names import LAYER_KEY, PREFIXES, rename
from common.model.values import kinds_of
from dejavu.errors import ConfigurationError

_LLAMA = """
    embed_tokens.weight                           vocab hidden
    layers.*.input_layernorm.weight               hidden
    layers.*.self_attn.q_proj.weight              query hidden
    layers.*.self_attn.q_proj.bias?attention_bias query
    layers.*.self_attn.k_proj.weight              key hidden
    layers.*.self_attn.k_proj.bias?attention_bias key
    layers.*.self_attn.v_proj.weight              key hidden
    layers.*.self_attn.v_proj.bias?attention_bias key
    layers.*.self_attn.o_proj.weight              hidden query
    layers.*.self_attn.o_proj.bias?attention_bias hidden
    layers.*.post_attention_layernorm.weight      hidden
    norm.weight                                   hidden
"""
_GATED = """
    layers.*.mlp.gate_proj.weight                 inner hidden
    layers.*.mlp.gate_proj.bias?mlp_bias          inner
    layers.*.mlp.up_proj.weight                   inner hidden
    layers.*.mlp.up_proj.bias?mlp_bias            inner
    layers.*.mlp.down_proj.weight                 hidden inner
    layers.*.mlp.down_proj.bias?mlp_bias          hidden
"""
_EXPERTS = """
    layers.*.mlp.gate.weight                      experts hidden
    layers.*.mlp.experts.*.w1.weight?             inner hidden
    layers.*.mlp.experts.*.w2.weight?             hidden inner
    layers.*.mlp.experts.*.w3.weight?             inner hidden
    layers.*.mlp.experts.gate_up_proj?            experts 2*inner hidden
    layers.*.mlp.experts.down_proj?               experts hidden inner
"""
_HEAD_NORMS = """
    layers.*.self_attn.q_norm.weight              head
    layers.*.self_attn.k_norm.weight              head
"""
_GPT2 = """
    wte.weight                                    vocab hidden
    wpe.weight                                    positions hidden
    h.*.ln_1.weight                               hidden
    h.*.ln_1.bias                                 hidden
    h.*.attn.c_attn.weight                        hidden 3*hidden
    h.*.attn.c_attn.bias                          3*hidden
    h.*.attn.c_proj.weight                        hidden hidden
    h.*.attn.c_proj.bias                          hidden
    h.*.ln_2.weight                               hidden
    h.*.ln_2.bias                                 hidden
    h.*.mlp.c_fc.weight                           hidden inner
    h.*.mlp.c_fc.bias                             inner
    h.*.mlp.c_proj.weight                         inner hidden
    h.*.mlp.c_proj.bias                           hidden
    ln_f.weight                                   hidden
    ln_f.bias                                     hidden
"""
_BLOOM = """
    word_embeddings.weight                        vocab hidden
    word_embeddings_layernorm.weight              hidden
    word_embeddings_layernorm.bias                hidden
    h.*.input_layernorm.weight                    hidden
    h.*.input_layernorm.bias                      hidden
    h.*.self_attention.query_key_value.weight     3*hidden hidden
    h.*.self_attention.query_key_value.bias       3*hidden
    h.*.self_attention.dense.weight               hidden hidden
    h.*.self_attention.dense.bias                 hidden
    h.*.post_attention_layernorm.weight           hidden
    h.*.post_attention_layernorm.bias             hidden
    h.*.mlp.dense_h_to_4h.weight                  inner hidden
    h.*.mlp.dense_h_to_4h.bias                    inner
    h.*.mlp.dense_4h_to_h.weight                  hidden inner
    h.*.mlp.dense_4h_to_h.bias                    hidden
    ln_f.weight                                   hidden
    ln_f.bias                                     hidden
"""
_GPT_NEOX = """
    embed_in.weight                               vocab hidden
    layers.*.input_layernorm.weight               hidden
    layers.*.input_layernorm.bias                 hidden
    layers.*.post_attention_layernorm.weight      hidden
    layers.*.post_attention_layernorm.bias        hidden
    layers.*.attention.query_key_value.weight     3*hidden hidden
    layers.*.attention.query_key_value.bias?attention_bias 3*hidden
    layers.*.attention.dense.weight               hidden hidden
    layers.*.attention.dense.bias?attention_bias  hidden
    layers.*.mlp.dense_h_to_4h.weight             inner hidden
    layers.*.mlp.dense_h_to_4h.bias               inner
    layers.*.mlp.dense_4h_to_h.weight             hidden inner
    layers.*.mlp.dense_4h_to_h.bias               hidden
    final_layer_norm.weight                       hidden
    final_layer_norm.bias                         hidden
"""
_OPT = """
    decoder.embed_tokens.weight                   vocab embedding
    decoder.embed_positions.weight                positions hidden
    decoder.project_in.weight?                    hidden embedding
    decoder.project_out.weight?                   embedding hidden
    decoder.layers.*.self_attn.q_proj.weight      hidden hidden
    decoder.layers.*.self_attn.q_proj.bias?enable_bias hidden
    decoder.layers.*.self_attn.k_proj.weight      hidden hidden
    decoder.layers.*.self_attn.k_proj.bias?enable_bias hidden
    decoder.layers.*.self_attn.v_proj.weight      hidden hidden
    decoder.layers.*.self_attn.v_proj.bias?enable_bias hidden
    decoder.layers.*.self_attn.out_proj.weight    hidden hidden
    decoder.layers.*.self_attn.out_proj.bias?enable_bias hidden
    decoder.layers.*.self_attn_layer_norm.weight? hidden
    decoder.layers.*.self_attn_layer_norm.bias?   hidden
    decoder.layers.*.fc1.weight                   inner hidden
    decoder.layers.*.fc1.bias?enable_bias         inner
    decoder.layers.*.fc2.weight                   hidden inner
    decoder.layers.*.fc2.bias?enable_bias         hidden
    decoder.layers.*.final_layer_norm.weight?     hidden
    decoder.layers.*.final_layer_norm.bias?       hidden
    decoder.final_layer_norm.weight?              hidden
    decoder.final_layer_norm.bias?                hidden
"""
_TABLES = {
    "bloom": _BLOOM,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA + _GATED,
    "mistral": _LLAMA + _GATED,
    "mixtral": _LLAMA + _EXPERTS,
    "opt": _OPT,
    "qwen2": _LLAMA + _GATED,
    "qwen3": _LLAMA + _GATED + _HEAD_NORMS,
}
_HEAD = "lm_head.weight"
_DTYPES = ("F32", "BF16", "F16", "F64")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What every config says, under whichever names."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int


def check_tensors(
    architecture: str, config: Mapping[str, Any], sizes: ModelSizes, stored: Mapping[str, StoredTensor], folder: Path
) -> None:
    """Raises `ConfigurationError` naming file, tensor and both shapes."""
    known = _known_sizes(architecture, config, sizes)
    wanted = dict(_table(architecture, config))
    there: set[str] = set()
    for key, tensor in stored.items():
        name = rename(key, PREFIXES[architecture])
        entry = wanted.get(_pattern(name))
        if entry is not None:
            there.add(name)
            _check_tensor(folder / tensor.file, key, tensor, [known[size] for size in entry[0]])
    for pattern, (_, is_needed) in wanted.items():
        for name in _names(pattern, sizes.num_layers) if is_needed else ():
            if name not in there:
                raise ConfigurationError(f"{folder}: no safetensors file has {name}", field="model")


def _table(architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[list[str], bool]]]:
    """Each name with the sizes of its shape, and whether it must be there."""
    flags = {name for name, kind, _ in kinds_of(architecture) if kind == "flag" and config.get(name) is True}
    for entry, *shape in filter(None, map(str.split, _TABLES[architecture].splitlines())):
        name, is_optional, flag = entry.partition("?")
        yield name, (shape, not is_optional or flag in flags)
    width = "embedding" if architecture == "opt" else "hidden"
    yield _HEAD, (["vocab", width], config.get("tie_word_embeddings") is False)


def _known_sizes(architecture: str, config: Mapping[str, Any], sizes: ModelSizes) -> dict[str, int | None]:
    """What the table's sizes are; None where the config does not say it."""

    def said(*names: str) -> int | None:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        return value if type(value) is int else None

    hidden = sizes.hidden_size
    inner = said("intermediate_size", "n_inner", "ffn_dim")
    if architecture == "bloom" or (architecture == "gpt2" and inner is None):
        inner = 4 * hidden
    return {
        "vocab": sizes.vocab_size,
        "hidden": hidden,
        "3*hidden": 3 * hidden,
        "head": sizes.head_dim,
        "query": sizes.num_heads * sizes.head_dim,
        "key": sizes.num_kv_heads * sizes.head_dim,
        "inner": inner,
        "2*inner": None if inner is None else 2 * inner,
        "experts": said("num_local_experts"),
        "embedding": said("word_embed_proj_dim") or hidden,
        # OPT's first two rows are for padding
        "positions": sizes.max_context_tokens + 2 * (architecture == "opt"),
    }


def _pattern(name: str) -> str:
    """The name with a star for the numbers of layer and expert."""
    match = LAYER_KEY.match(name)
    if match is None:
        return name
    return _EXPERT.sub("*", f"{match[1]}*.{name[match.end() :]}")


def _names(pattern: str, num_layers: int) -> list[str]:
    return [pattern.replace("*", str(layer)) for layer in range(num_layers)] if "*" in pattern else [pattern]


def _check_tensor(file: Path, key: str, tensor: StoredTensor, wanted: list[int | None]) -> None:
    fits = len(wanted) == len(tensor.shape) and all(
        theirs is None or ours == theirs for ours, theirs in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        asked = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ConfigurationError(
            f"{file}: {key} is {list(tensor.shape)}, where config.json asks for [{asked}]", field="model"
        )
    if tensor.dtype not in _DTYPES:
        raise ConfigurationError(
            f"{file}: {key} is of {tensor.dtype}; quantised checkpoints are not supported", field="model"
        )
