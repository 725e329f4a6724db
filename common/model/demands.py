"""What a config.json may ask for that would be served wrongly: it is refused by name (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dejavu.errors import ConfigurationError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Frequencies that do not depend on a sequence's length within the model's context; those of `longrope` do, and a batch
has sequences of all lengths."""
_QUANTISATIONS = ("quantization_config", "compression_config")


def check_demands(config: Mapping[str, Any], config_file: Path) -> None:
    """Raises `ConfigurationError` naming the field that cannot be served."""
    for name in _QUANTISATIONS:
        if config.get(name):
            method = config[name].get("quant_method", "unknown") if isinstance(config[name], Mapping) else config[name]
            raise ConfigurationError(
                f"{config_file}: {name} (method {method!r}): quantised checkpoints are not supported", field="model"
            )
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(name, config.get(name), config_file)


def _check_rope(name: str, rope: object, config_file: Path) -> None:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise ConfigurationError(f"{config_file}: {name} is {rope!r}, not an object", field="model")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigurationError(
            f"{config_file}: {name}: type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}",
            field="model",
        )
