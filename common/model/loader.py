"""Loads layers [a, b) of a checkpoint into transformers' own modules, reading only those layers' tensors.

The stage is built as a shallower model of the same class: layer a becomes layer 0. What the stage does not own
(embedding, final norm, head) is replaced by a part that does nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

from common.model.attention import ATTENTION_NAME, current_pass, paged_attention
from common.model.linear import pack_linears
from common.model.spec import ModelSpec
from dejavu.errors import ConfigurationError

LAYER_KEY = re.compile(r"^(?:[a-z_]+\.)*?(?:h|layers)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the parts in the base model: `embeddings` belong to the first stage (those of `zeroed` add zero
    elsewhere), `finals` to the last."""

    embeddings: tuple[str, ...]
    finals: tuple[str, ...]
    zeroed: tuple[str, ...] = ()


_LLAMA = Family(("embed_tokens",), ("norm",))
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Family(("embed_in",), ("final_layer_norm",)),
    "gpt2": Family(("wte", "wpe"), ("ln_f",), ("wpe",)),
    "bloom": Family(("word_embeddings", "word_embeddings_layernorm"), ("ln_f",)),
    "opt": Family(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        ("decoder.final_layer_norm", "decoder.project_out"),
        ("decoder.embed_positions",),
    ),
}

AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *arguments, **options: None)


class Nothing(nn.Module):
    """Stands for an additive embedding that another stage has added."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return torch.zeros(())


class StageModel:
    """Layers [a, b). `forward` takes token ids on the first stage and hidden states on the others; `head` exists on the
    last stage."""

    def __init__(self, model: Any, layers: tuple[int, int], is_first: bool, is_last: bool) -> None:
        self.layers = layers
        self.is_first = is_first
        self.is_last = is_last
        self._base = model.base_model
        # BLOOM's ALiBi needs none
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self._head = model.get_output_embeddings() if is_last else None

    def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """inputs [rows] ids or [rows, hidden]; positions [rows] -> [rows, hidden]."""
        name = "input_ids" if self.is_first else "inputs_embeds"
        arguments: dict[str, Any] = {name: inputs[None], "use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = positions[None]
        output: Tensor = self._base(**arguments).last_hidden_state
        return output[0]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> logits [rows, vocab]."""
        assert self._head is not None
        logits: Tensor = self._head(hidden)
        return logits


def load_stage(spec: ModelSpec, layers: tuple[int, int], device: str = "cpu") -> StageModel:
    """Reads the stage's tensors and builds it. Raises `ConfigurationError` naming file or tensor."""
    is_first, is_last = layers[0] == 0, layers[1] == spec.num_layers
    config = _stage_config(spec, layers, is_first, is_last)
    state = _read_state(spec, layers, is_first, is_last, bool(config.tie_word_embeddings))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    # what a stage does not own is missing on purpose: no report of it on stderr
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        generation_config=GenerationConfig(),
        output_loading_info=True,
    )
    _refuse_missing(spec, config, report["missing_keys"], is_first, is_last)
    _drop_parts(model.base_model, FAMILIES[spec.model_type], is_first, is_last)
    if spec.model_type == "bloom":
        _patch_bloom(model.base_model)
    if spec.model_type == "gpt2" and config.scale_attn_by_inverse_layer_idx:
        for local_layer, block in enumerate(model.base_model.h):
            block.attn.scaling *= (local_layer + 1) / (layers[0] + local_layer + 1)
    model.eval().requires_grad_(False).to(device)
    if not is_last:
        model.set_output_embeddings(nn.Identity())
    if device == "cpu":
        pack_linears(model)
    return StageModel(model, layers, is_first, is_last)


def _stage_config(spec: ModelSpec, layers: tuple[int, int], is_first: bool, is_last: bool) -> Any:
    config = copy.deepcopy(AutoConfig.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False))
    config.num_hidden_layers = layers[1] - layers[0]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers[0] : layers[1]]
    config.attention_dropout = 0.0
    config.use_cache = False
    # end and padding tokens are the scheduler's business; a padding id would have to fit a cut vocabulary
    config.pad_token_id = None
    if not is_first and not is_last:
        config.vocab_size = 1
    if is_first and not is_last:
        config.tie_word_embeddings = True
    config._attn_implementation = "eager" if spec.model_type == "bloom" else ATTENTION_NAME
    return config


def _read_state(
    spec: ModelSpec, layers: tuple[int, int], is_first: bool, is_last: bool, is_tied: bool
) -> dict[str, Tensor]:
    """The stage's tensors under their names in the shallower model."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for key, file in spec.keys.items():
        name = _stage_key(key, spec.model_type, layers, is_first, is_last, is_tied)
        if name is not None:
            wanted.setdefault(file, []).append((key, name))
    state: dict[str, Tensor] = {}
    for file, names in wanted.items():
        path = Path(spec.model_dir, file)
        try:
            with safe_open(path, framework="pt") as tensors:
                for key, name in names:
                    state[name] = tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{path}: {error}", field="model") from error
    return state


def _stage_key(
    key: str, model_type: str, layers: tuple[int, int], is_first: bool, is_last: bool, is_tied: bool
) -> str | None:
    """The name a tensor of the checkpoint has in the stage; None: the stage does not own it."""
    match = LAYER_KEY.match(key)
    if match is not None:
        layer = int(match[1])
        if not layers[0] <= layer < layers[1]:
            return None
        return f"{key[: match.start(1)]}{layer - layers[0]}{key[match.end(1) :]}"
    family = FAMILIES[model_type]
    if _is_part(key, family.embeddings):
        is_shared = is_last and is_tied and _is_part(key, family.embeddings[:1])
        return key if is_first or is_shared else None
    return key if is_last else None


def _is_part(key: str, parts: Iterable[str]) -> bool:
    return any(f".{part}." in f".{key}" for part in parts)


def _refuse_missing(spec: ModelSpec, config: Any, missing: Iterable[str], is_first: bool, is_last: bool) -> None:
    """Tensors that the stage owns and the checkpoint lacks."""
    family = FAMILIES[spec.model_type]
    for key in missing:
        is_embedding, is_layer = _is_part(key, family.embeddings), LAYER_KEY.match(key) is not None
        is_head = not is_embedding and not is_layer and not _is_part(key, family.finals)
        is_owned = is_layer or (is_first if is_embedding else is_last)
        if is_owned and not (is_head and config.tie_word_embeddings):
            raise ConfigurationError(f"{spec.model_dir} has no tensor {key}", field="model")


def _drop_parts(base: Any, family: Family, is_first: bool, is_last: bool) -> None:
    parts = (() if is_first else family.embeddings) + (() if is_last else family.finals)
    for path in parts:
        owner, _, name = f".{path}".rpartition(".")
        parent = functools.reduce(getattr, [p for p in owner.split(".") if p], base)
        if getattr(parent, name, None) is None:
            continue
        if name.startswith("project_"):
            setattr(parent, name, None)
        else:
            setattr(parent, name, Nothing() if path in family.zeroed else nn.Identity())


def _patch_bloom(base: Any) -> None:
    """BLOOM's attention does not go through transformers' attention interface: replace it."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    slopes = build_alibi_tensor(torch.ones(1, 2), base.h[0].num_heads, torch.float32)[:, 0, 1]

    def forward(self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        attended = current_pass.get().attend(
            self.layer_idx, query[0], key[0], value[0], self.inv_norm_factor, None, slopes.to(query.device)
        )
        return residual + self.dense(attended.reshape(hidden_states.shape)), None

    for block in base.h:
        block.self_attention.forward = forward.__get__(block.self_attention)
