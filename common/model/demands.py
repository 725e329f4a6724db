"""What a config.json may ask for that would be served wrongly: it is refused by name (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.model.values import is_number, wrong_values
from dejavu.errors import ConfigurationError

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""What each type cannot do without."""
_ROPE_ABOVE_0 = ("rope_theta", "rotary_emb_base", "factor", "original_max_position_embeddings")
_ROPE_NUMBERS = ("rotary_pct", "low_freq_factor", "high_freq_factor")
_ROPE_MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor")
_OUTSIDE_ROPE = ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
"""What older files have beside everything else."""
_NOT_ROTARY = ("bloom", "gpt2", "opt")
ROPE_TYPES = tuple(_ROPE_NEEDS)
"""Frequencies that do not depend on a sequence's length within the model's context; those of `longrope` do, and a batch
has sequences of all lengths."""
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
"""What transformers knows, which cannot be asked without torch. Another would be refused by the stages, in seconds."""
_ACTIVATION_FIELDS = {"gpt2": "activation_function", "opt": "activation_function"}
"""Where a family does not call it `hidden_act`."""
_GUESSED = {
    "gpt_neox": ("intermediate_size",),
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size", "num_key_value_heads"),
    "mixtral": ("intermediate_size", "num_key_value_heads", "num_local_experts"),
    "opt": ("ffn_dim",),
    "qwen2": ("intermediate_size", "num_key_value_heads"),
    "qwen3": ("intermediate_size", "num_key_value_heads", "head_dim"),
}
"""What transformers takes from the family's first model where a config does not say it."""
_LAYER_TYPES = ("full_attention", "sliding_attention")
_QUANTISATIONS = ("quantization_config", "compression_config")


def check_demands(config: Mapping[str, Any], config_file: Path) -> None:
    """Raises `ConfigurationError` naming the field that cannot be served."""
    for wrong in _wrongs(config):
        raise ConfigurationError(f"{config_file}: {wrong}", field="model")


def _wrongs(config: Mapping[str, Any]) -> Iterator[str]:
    """The first counts: what follows relies on the types that were judged before."""
    for name in _QUANTISATIONS:
        if config.get(name):
            method = config[name].get("quant_method", "unknown") if isinstance(config[name], Mapping) else config[name]
            yield f"{name} (method {method!r}): quantised checkpoints are not supported"
    yield from wrong_values(config)
    for name in _GUESSED.get(config["model_type"], ()):
        if name not in config:
            yield f"say {name}: where it is left out, transformers takes that of the family's first model"
    for name in ("rope_parameters", "rope_scaling"):
        yield from _wrong_rope(name, config.get(name))
    if config["model_type"] not in _NOT_ROTARY:
        yield from _wrong_rope_numbers("", {name: config[name] for name in _OUTSIDE_ROPE if name in config})
    yield from _wrong_windows(config)
    yield from _wrong_experts(config)
    if not config.get("is_causal", True):
        # for transformers each token then sees those that follow it, too
        yield f"is_causal is {config['is_causal']!r}: only causal attention is supported"
    if config.get("transformers_weights"):
        yield f"transformers_weights is {config['transformers_weights']!r}: weights of another name are not supported"
    if config["model_type"] == "bloom" and config.get("slow_but_exact") and config.get("pretraining_tp", 1) != 1:
        tp = config["pretraining_tp"]
        yield f"slow_but_exact with pretraining_tp {tp!r}: transformers then leaves out the biases of attention"
    if config["model_type"] != "bloom":  # which has one of its own
        yield from _wrong_activation(config)


def _wrong_rope(name: str, rope: object) -> Iterator[str]:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield f"{name} is {rope!r}, not an object"
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        yield f"{name}: type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        return
    for needed in _ROPE_NEEDS[kind]:
        if needed not in rope:
            yield f"{name}: type {kind!r} needs {needed}"
    for part, value in rope.items():
        if isinstance(value, Mapping):
            yield f"{name}: {part} is of some layers only, which is not supported"
    yield from _wrong_rope_numbers(f"{name}: ", rope)


def _wrong_rope_numbers(where: str, rope: Mapping[str, Any]) -> Iterator[str]:
    for name, value in rope.items():
        if name in _ROPE_ABOVE_0 and not (is_number(value) and value > 0):
            yield f"{where}{name} is {value!r}, no number above 0"
        may_be_null = name in _ROPE_MAY_BE_NULL
        if (name in _ROPE_NUMBERS or may_be_null) and not (is_number(value) or (value is None and may_be_null)):
            yield f"{where}{name} is {value!r}, no number"


def _wrong_windows(config: Mapping[str, Any]) -> Iterator[str]:
    layers, window = config.get("layer_types"), config.get("sliding_window")
    if layers is not None:
        if not isinstance(layers, list) or any(kind not in _LAYER_TYPES for kind in layers):
            yield f"layer_types is {layers!r}: supported is a list of {' and '.join(_LAYER_TYPES)}"
        elif len(layers) != config.get("num_hidden_layers", len(layers)):
            yield f"layer_types names {len(layers)} layers, num_hidden_layers is {config['num_hidden_layers']!r}"
    has_window = config["model_type"] in ("mistral", "mixtral") or config.get("use_sliding_window")
    if has_window and window is not None and window < 1:
        yield f"sliding_window is {window!r}: say null for none"


def _wrong_experts(config: Mapping[str, Any]) -> Iterator[str]:
    chosen, there = config.get("num_experts_per_tok"), config.get("num_local_experts")
    if config["model_type"] == "mixtral" and chosen is not None and there is not None and not 1 <= chosen <= there:
        yield f"num_experts_per_tok is {chosen!r}, of num_local_experts {there!r}"


def _wrong_activation(config: Mapping[str, Any]) -> Iterator[str]:
    name = _ACTIVATION_FIELDS.get(config["model_type"], "hidden_act")
    if name in config and config[name] not in ACTIVATIONS:
        yield f"{name} {config[name]!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
