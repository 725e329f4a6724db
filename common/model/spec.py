"""What a checkpoint is, without loading it (and without torch): shapes, end tokens, fingerprint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.model.demands import check_demands
from common.model.generation import GenerationDefaults
from common.model.headers import read_headers, read_json
from common.model.names import LAYER_KEY, PREFIXES
from common.model.shapes import ModelSizes, check_tensors
from dejavu.errors import ConfigurationError

SUPPORTED = tuple(PREFIXES)
"""`model_type` values of the families that can be served."""
DTYPES = ("float32", "bfloat16", "float16")
_EVEN_HEADS = ("bloom", "gpt2", "gpt_neox", "opt")
"""Families whose heads share the hidden size, each with keys and values of its own."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts of a checkpoint directory. `architecture` is one of `SUPPORTED`, `head_dim` that of keys and values,
    `keys` maps each tensor's name to the file that holds it."""

    model_dir: Path
    name: str
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    fingerprint: str
    generation: GenerationDefaults
    keys: dict[str, str] = field(repr=False, hash=False)


def load_spec(model_dir: str | Path, dtype: str = "auto") -> ModelSpec:
    """Reads config and safetensors headers. Raises `ConfigurationError` naming the file that is wrong."""
    folder = Path(model_dir)
    if not os.path.isdir(folder):  # whatever may be wrong with the name
        raise ConfigurationError(f"{folder} is not a directory with a Hugging Face checkpoint", field="model")
    config_file = folder / "config.json"
    config = read_json(config_file)
    architecture = config.get("model_type")
    if architecture not in SUPPORTED:
        raise ConfigurationError(
            f"{config_file}: architecture {architecture!r} is not supported; supported are {', '.join(SUPPORTED)}",
            field="model",
        )
    check_demands(config, config_file)
    tensors, digest = read_headers(folder)
    digest.update(config_file.read_bytes())
    sizes = sizes_of(config, config_file)
    _check_layers(sizes.num_layers, tensors, config_file)
    check_tensors(architecture, config, sizes, tensors, folder)
    generation, generation_file = _generation(folder, config)
    return ModelSpec(
        model_dir=folder,
        name=folder.resolve().name,
        architecture=architecture,
        num_layers=sizes.num_layers,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        max_context_tokens=sizes.max_context_tokens,
        eos_token_ids=_eos_token_ids(generation, generation_file),
        dtype=_dtype(config, dtype),
        fingerprint=digest.hexdigest(),
        generation=GenerationDefaults.of(generation, generation_file),
        keys={key: tensor.file for key, tensor in tensors.items()},
    )


def split_layers(num_layers: int, num_stages: int, counts: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Layer ranges of the stages: `counts` layers each, else even with the remainder in the first stages. Raises
    `ConfigurationError` where they do not add up."""
    if counts is None:
        if not 1 <= num_stages <= num_layers:
            raise ConfigurationError(f"{num_stages} stages for {num_layers} layers", field="stages")
        each, more = divmod(num_layers, num_stages)
        counts = [each + (stage < more) for stage in range(num_stages)]
    if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
        raise ConfigurationError(
            f"split {','.join(map(str, counts))} does not cut {num_layers} layers into {num_stages} stages",
            field="split",
        )
    ranges, start = [], 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    return ranges


@dataclass(frozen=True, slots=True)
class _Counts:
    """The whole numbers above 0 of a config."""

    config: dict[str, Any]
    file: Path

    def of(self, *names: str, default: int | None = None) -> int:
        """The first that is there. Raises `ConfigurationError`."""
        name = next((name for name in names if self.config.get(name) is not None), " or ".join(names))
        size = default if self.config.get(name) is None else self.config[name]
        if type(size) is not int or size < 1:
            raise ConfigurationError(f"{self.file}: {name} is {size!r}, no whole number above 0", field="model")
        return size


def sizes_of(config: dict[str, Any], config_file: Path) -> ModelSizes:
    """Raises `ConfigurationError` naming the size that is wrong."""
    counts = _Counts(config, config_file)
    # BLOOM's first files call it n_embed, which then counts
    hidden_size = counts.of("n_embed", "hidden_size", "n_embd")
    num_heads = counts.of("num_attention_heads", "n_head")
    num_kv_heads = counts.of("num_key_value_heads", default=num_heads)
    head_dim = counts.of("head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ConfigurationError(
            f"{config_file}: num_key_value_heads is {num_kv_heads}, which {num_heads} heads cannot share evenly",
            field="model",
        )
    if config.get("model_type") in (*_EVEN_HEADS, "llama") and hidden_size % num_heads:
        raise ConfigurationError(
            f"{config_file}: {num_heads} heads cannot share the hidden size of {hidden_size} evenly", field="model"
        )
    if config.get("model_type") in _EVEN_HEADS:
        _check_heads(config, {"num_key_value_heads": num_heads, "head_dim": hidden_size // num_heads}, config_file)
    return ModelSizes(
        num_layers=counts.of("num_hidden_layers", "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        vocab_size=counts.of("vocab_size"),
        # BLOOM has no position table: its context is what it was trained with, if it says so
        max_context_tokens=counts.of("max_position_embeddings", "n_positions", "seq_length", default=2048),
    )


def _check_heads(config: dict[str, Any], theirs: dict[str, int], config_file: Path) -> None:
    """`theirs` is what the family has, whatever its config says."""
    for name, size in theirs.items():
        if config.get(name) not in (None, size):
            raise ConfigurationError(
                f"{config_file}: {name} is {config[name]!r}, where a {config['model_type']} of these sizes has {size}",
                field="model",
            )


def _check_layers(num_layers: int, keys: Iterable[str], config_file: Path) -> None:
    """Some file must have each layer. What of it, the stages look for."""
    there = {int(match[2]) for match in map(LAYER_KEY.match, keys) if match}
    missing = next((layer for layer in range(num_layers) if layer not in there), None)
    if missing is not None:
        raise ConfigurationError(
            f"{config_file}: of its {num_layers} layers the safetensors files lack layer {missing}", field="model"
        )


def _generation(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """As transformers has it: `generation_config.json` decides, also by saying nothing; without it the config does."""
    file = folder / "generation_config.json"
    return (read_json(file), file) if file.exists() else (config, folder / "config.json")


def _eos_token_ids(generation: dict[str, Any], file: Path) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token_id) is int for token_id in token_ids):
        raise ConfigurationError(f"{file}: eos_token_id {eos!r} is no token id, nor a list of them", field="model")
    return tuple(token_ids)


def _dtype(config: dict[str, Any], wanted: str) -> str:
    if wanted == "auto":
        wanted = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if wanted not in DTYPES:
        raise ConfigurationError(f"dtype {wanted!r} is not one of {', '.join(DTYPES)}", field="dtype")
    return wanted
