"""What a config.json may ask for that would be served wrongly: it is refused by name (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dejavu.errors import ConfigurationError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
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
_QUANTISATIONS = ("quantization_config", "compression_config")


def check_demands(config: Mapping[str, Any], config_file: Path) -> None:
    """Raises `ConfigurationError` naming the field that cannot be served."""
    for wrong in _wrongs(config):
        raise ConfigurationError(f"{config_file}: {wrong}", field="model")


def _wrongs(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _QUANTISATIONS:
        if config.get(name):
            method = config[name].get("quant_method", "unknown") if isinstance(config[name], Mapping) else config[name]
            yield f"{name} (method {method!r}): quantised checkpoints are not supported"
    for name in ("rope_parameters", "rope_scaling"):
        yield from _wrong_rope(name, config.get(name))
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


def _wrong_activation(config: Mapping[str, Any]) -> Iterator[str]:
    name = _ACTIVATION_FIELDS.get(config["model_type"], "hidden_act")
    if name in config and config[name] not in ACTIVATIONS:
        yield f"{name} {config[name]!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
