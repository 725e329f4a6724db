"""Which tensors of a checkpoint a stage needs, under which names, and reading just those."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.model.names import LAYER_KEY, in_modules
from common.model.spec import ModelSpec
from dejavu.errors import ConfigurationError

_EXPERT_PART = re.compile(r"^(.*\.experts)\.(\d+)\.(w[123])\.weight$")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stage_name(key: str, layers: tuple[int, int]) -> str | None:
    """A tensor's name in the stage, where layer a is layer 0; None for a layer of another stage."""
    match = LAYER_KEY.match(key)
    if match is None:
        return key
    layer = int(match[2])
    return f"{match[1]}{layer - layers[0]}.{key[match.end() :]}" if layers[0] <= layer < layers[1] else None


def stage_keys(spec: ModelSpec, layers: tuple[int, int], expected: Collection[str], prefix: str) -> dict[str, str]:
    """{key in the checkpoint: name in the stage} of the tensors the stage reads. `expected` are the stage's parameters;
    `prefix` is what checkpoints of the bare base model leave out. An expert's part keeps a name of its own, which
    `fuse_experts` understands."""
    names: dict[str, str] = {}
    for key in spec.keys:
        stored = stage_name(key, layers)
        if stored is None:
            continue
        renamed = in_modules(stored)
        for name in (stored, renamed, f"{prefix}.{stored}", f"{prefix}.{renamed}"):
            if name in expected or _fused_name(name) in expected:
                names[key] = name
                break
    return names


def read_tensors(spec: ModelSpec, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors in the stage's dtype. Raises `ConfigurationError` naming the file."""
    by_file: dict[str, list[str]] = {}
    for key in keys:
        by_file.setdefault(spec.keys[key], []).append(key)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    tensors: dict[str, Tensor] = {}
    for file, wanted in by_file.items():
        path = Path(spec.model_dir, file)
        try:
            with safe_open(path, framework="pt") as stored:
                for key in wanted:
                    tensors[key] = _weight(path, key, stored.get_tensor(key)).to(dtype)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{path}: {error}", field="model") from error
    return tensors


def _weight(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Refuses numbers that mean nothing without the scales of some quantisation."""
    if tensor.dtype not in _WEIGHT_DTYPES:
        raise ConfigurationError(
            f"{path}: {key} is of {tensor.dtype}; quantised checkpoints are not supported", field="model"
        )
    return tensor


def fuse_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files keep Mixtral's experts one by one, transformers keeps them stacked: [experts, out, in]."""
    fused = {name: tensor for name, tensor in state.items() if not _EXPERT_PART.match(name)}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name in state.keys() - fused.keys():
        layer, number, part = _EXPERT_PART.findall(name)[0]
        experts.setdefault(layer, {}).setdefault(int(number), {})[part] = state[name]
    for layer, parts in experts.items():
        try:
            ordered = [parts[number] for number in range(max(parts) + 1)]
            gate_up = [torch.cat((expert["w1"], expert["w3"])) for expert in ordered]
            fused[f"{layer}.gate_up_proj"] = torch.stack(gate_up)
            fused[f"{layer}.down_proj"] = torch.stack([expert["w2"] for expert in ordered])
        except KeyError as error:
            raise ConfigurationError(f"the checkpoint lacks {error} of {layer}", field="model") from error
    return fused


def _fused_name(name: str) -> str | None:
    """The parameter that an expert's tensor becomes a part of."""
    match = _EXPERT_PART.match(name)
    return match and f"{match[1]}.{'down_proj' if match[3] == 'w2' else 'gate_up_proj'}"
