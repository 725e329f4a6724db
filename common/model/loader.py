"""Loads layers [a, b) of a checkpoint into transformers' own modules, reading only those layers' tensors.

The stage is a shallower model of the same class: layer a becomes layer 0, and parts that other stages own are taken
out before any memory is spent on them. What is left says which tensors to read.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.attention import ATTENTION_NAME
from common.model.checkpoint import fuse_experts, read_tensors, stage_keys
from common.model.families import FAMILIES, alibi_slopes, drop_parts
from common.model.fused import FusedModel, is_fusible
from common.model.linear import pack_linears
from common.model.native import LANES, Kernels, load_kernels
from common.model.spec import ModelSpec
from dejavu.errors import ConfigurationError


class BaseModel:
    """Calls transformers' base model, which wants names and a batch dimension."""

    def __init__(self, base: Any, is_first: bool) -> None:
        self._base = base
        self._input_name = "input_ids" if is_first else "inputs_embeds"
        # BLOOM's ALiBi needs none
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def __call__(self, inputs: Tensor, positions: Tensor) -> Tensor:
        arguments: dict[str, Any] = {self._input_name: inputs[None], "use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = positions[None]
        output: Tensor = self._base(**arguments).last_hidden_state
        return output[0]


@dataclass(frozen=True, slots=True)
class StageModel:
    """Layers [a, b). `forward` takes token ids [rows] on the first stage, hidden states [rows, hidden] on the others,
    and positions [rows]; it gives [rows, hidden]. `head` turns these into logits on the last stage. `alibi_slopes`
    [heads] where attention is biased by distance; `kernels` where they can be used."""

    layers: tuple[int, int]
    is_last: bool
    forward: Callable[[Tensor, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    alibi_slopes: Tensor | None
    kernels: Kernels | None


def load_stage(spec: ModelSpec, layers: tuple[int, int], device: str = "cpu", *, is_native: bool = True) -> StageModel:
    """Reads the stage's tensors and builds it. On CPUs it uses the native kernels, unless `is_native` is False or they
    cannot be had. Raises `ConfigurationError` naming file or tensor."""
    _set_up_torch()
    family = FAMILIES[spec.architecture]
    is_first, is_last = layers[0] == 0, layers[1] == spec.num_layers
    config = _stage_config(spec, layers)
    model = _empty_model(spec, config)
    base = model.base_model
    drop_parts(base, family, is_first, is_last)
    if not is_last:
        model.set_output_embeddings(nn.Identity())
    _assign(model, _read_state(spec, layers, model, f"{family.embeddings[0]}.weight"))
    if hasattr(base, "rotary_emb"):
        # its frequencies are computed, not stored
        base.rotary_emb = type(base.rotary_emb)(config=config)
    family.adapt(base, layers[0])
    model.eval().requires_grad_(False).to(device)
    kernels: Kernels | None = None
    forward: Callable[[Tensor, Tensor], Tensor] = BaseModel(base, is_first)
    if device == "cpu":
        if is_native and spec.head_dim % LANES == 0:
            kernels = load_kernels(getattr(torch, spec.dtype))
        if kernels is not None and family.is_fusible and is_fusible(config):
            forward = FusedModel(base, kernels)
        pack_linears(model)
    slopes = alibi_slopes(config.num_attention_heads).to(device) if family.has_alibi else None
    return StageModel(layers, is_last, forward, model.get_output_embeddings(), slopes, kernels)


def _empty_model(spec: ModelSpec, config: Any) -> Any:
    """A model without memory for its parameters. Raises `ConfigurationError` for what transformers cannot build."""
    # BLOOM knows eager attention only, until `adapt` replaces it
    attention = "eager" if FAMILIES[spec.architecture].has_alibi else ATTENTION_NAME
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # noqa: BLE001 a value that no layer knows shows as anything, from KeyError on
        raise _unusable(spec, error) from error


def _unusable(spec: ModelSpec, error: Exception) -> ConfigurationError:
    reason = " ".join(str(error).split())
    return ConfigurationError(f"{spec.model_dir / 'config.json'}: {type(error).__name__}: {reason}", field="model")


def _check_sizes(spec: ModelSpec, config: Any) -> None:
    """Where config.json leaves a size out, the family has a default of its own, which the pools would not fit."""
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, ours, theirs in (
        ("num_hidden_layers", spec.num_layers, config.num_hidden_layers),
        ("num_key_value_heads", spec.num_kv_heads, num_kv_heads),
        ("head_dim", spec.head_dim, head_dim),
        ("hidden_size", spec.hidden_size, config.hidden_size),
        ("vocab_size", spec.vocab_size, config.vocab_size),
    ):
        if ours != theirs:
            file = spec.model_dir / "config.json"
            raise ConfigurationError(f"{file}: say {name}: here it is {ours}, for transformers {theirs}", field="model")


def _set_up_torch() -> None:
    # some containers turn TF32 on, whose products have 10 bits: greedy tokens would not be those of float32
    with warnings.catch_warnings():
        # some versions of torch say, whenever they are asked, that one day they will want to be asked differently
        warnings.simplefilter("ignore", UserWarning)
        torch.set_float32_matmul_precision("highest")
    # where torch prefers cuDNN's attention (on H100 and later) it makes a plan for each batch size and length, in tens
    # of milliseconds, and ours are new with every step
    torch.backends.cuda.enable_cudnn_sdp(False)


def _stage_config(spec: ModelSpec, layers: tuple[int, int]) -> Any:
    try:
        config = AutoConfig.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 its checks raise errors of three libraries
        raise _unusable(spec, error) from error
    _check_sizes(spec, config)
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers[1] - layers[0]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers[0] : layers[1]]
    config.use_cache = False
    config.output_hidden_states = False
    config.return_dict = True
    return config


def _read_state(spec: ModelSpec, layers: tuple[int, int], model: Any, embedding: str) -> dict[str, Tensor]:
    """The stage's parameters by name. A tied head is the embedding, which the last stage reads again."""
    expected: Collection[str] = model.state_dict().keys()
    prefix = model.base_model_prefix
    heads = [name for name in expected if not name.startswith(f"{prefix}.")]
    names = stage_keys(spec, layers, expected, prefix)
    tensors = read_tensors(spec, names)
    state = fuse_experts({names[key]: tensor for key, tensor in tensors.items()})
    if model.config.tie_word_embeddings and heads and not state.keys() >= set(heads):
        tied = state.get(f"{prefix}.{embedding}")
        if tied is None:
            keys = [key for key in (f"{prefix}.{embedding}", embedding) if key in spec.keys]
            tied = next(iter(read_tensors(spec, keys[:1]).values()), None)
        if tied is not None:
            state.update(dict.fromkeys(heads, tied))
    return state


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    except RuntimeError as error:
        # a tensor of another shape than the configuration says
        raise ConfigurationError(f"the checkpoint does not fit its config.json: {error}", field="model") from error
    if missing:
        raise ConfigurationError(f"the checkpoint has no tensor {missing[0]}", field="model")
