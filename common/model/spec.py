"""What a checkpoint is, without loading it (and without torch): shapes, end tokens, fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.model.demands import check_demands
from common.model.generation import GenerationDefaults
from dejavu.errors import ConfigurationError

SUPPORTED = ("bloom", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3")
"""`model_type` values of the families that can be served."""
DTYPES = ("float32", "bfloat16", "float16")
MAX_HEADER_BYTES = 100 << 20
LAYER_KEY = re.compile(r"^((?:[a-z_]+\.)*?(?:h|layers)\.)(\d+)\.")
"""The name of a tensor of a layer: what is before its number, and the number."""


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
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a directory with a Hugging Face checkpoint", field="model")
    config_file = folder / "config.json"
    config = _read_json(config_file)
    architecture = config.get("model_type")
    if architecture not in SUPPORTED:
        raise ConfigurationError(
            f"{config_file}: architecture {architecture!r} is not supported; supported are {', '.join(SUPPORTED)}",
            field="model",
        )
    check_demands(config, config_file)
    keys, digest = _read_headers(folder)
    digest.update(config_file.read_bytes())
    sizes = _Sizes(config, config_file)
    num_layers, num_heads = sizes.of("num_hidden_layers", "n_layer"), sizes.of("num_attention_heads", "n_head")
    _check_layers(num_layers, keys, config_file)
    # BLOOM's first files call it n_embed, which then counts
    hidden_size = sizes.of("n_embed", "hidden_size", "n_embd")
    generation, generation_file = _generation(folder, config)
    return ModelSpec(
        model_dir=folder,
        name=folder.resolve().name,
        architecture=architecture,
        num_layers=num_layers,
        num_kv_heads=sizes.of("num_key_value_heads", default=num_heads),
        head_dim=sizes.of("head_dim", default=hidden_size // num_heads),
        hidden_size=hidden_size,
        vocab_size=sizes.of("vocab_size"),
        # BLOOM has no position table: its context is what it was trained with, if it says so
        max_context_tokens=sizes.of("max_position_embeddings", "n_positions", "seq_length", default=2048),
        eos_token_ids=_eos_token_ids(generation, generation_file),
        dtype=_dtype(config, dtype),
        fingerprint=digest.hexdigest(),
        generation=GenerationDefaults.of(generation, generation_file),
        keys=keys,
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
class _Sizes:
    """The whole numbers above 0 of a config."""

    config: dict[str, Any]
    file: Path

    def of(self, *names: str, default: int | None = None) -> int:
        """The first that is there. Raises `ConfigurationError`."""
        name = next((name for name in names if self.config.get(name) is not None), names[0])
        size = self.config[name] if self.config.get(name) is not None else default
        if type(size) is not int or size < 1:
            raise ConfigurationError(f"{self.file}: {name} is {size!r}, no whole number above 0", field="model")
        return size


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
    return (_read_json(file), file) if file.exists() else (config, folder / "config.json")


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


def _read_json(file: Path) -> dict[str, Any]:
    _check_kind(file)
    try:
        document = json.loads(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}", field="model") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is no JSON: {error}", field="model") from error
    if not isinstance(document, dict):
        raise ConfigurationError(f"{file} holds no JSON object", field="model")
    return document


def _check_kind(file: Path) -> None:
    """To open a pipe would take until somebody writes to it."""
    if file.exists() and not file.is_file():
        raise ConfigurationError(f"{file} is no file", field="model")


def _read_headers(folder: Path) -> tuple[dict[str, str], hashlib._Hash]:
    """Tensor names by file and a digest over all headers."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigurationError(f"{index} has no weight_map", field="model")
        files = sorted({str(name) for name in weight_map.values()})
    else:
        files = ["model.safetensors"]
    keys: dict[str, str] = {}
    digest = hashlib.sha256()
    for name in files:
        if Path(name).name != name:
            raise ConfigurationError(f"{index}: {name!r} leaves the directory", field="model")
        header = _read_header(folder / name)
        digest.update(header)
        keys.update({key: name for key in json.loads(header) if key != "__metadata__"})
    return keys, digest


def _read_header(file: Path) -> bytes:
    """A safetensors header, checked against the file's size."""
    _check_kind(file)
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = stream.read(length)
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = max((int(v["data_offsets"][1]) for v in tensors.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{file.stat().st_size} bytes where its header asks for {8 + length + end}")
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}", field="model") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigurationError(f"{file} is no complete safetensors file: {error}", field="model") from error
    return header
