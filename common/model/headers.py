"""What the files of a checkpoint hold, from their headers alone (no torch). Every error names the file."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.errors import ConfigurationError

WHOLE = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`dtype` is as safetensors writes it, e.g. "BF16"."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises `ConfigurationError`."""
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


def read_headers(folder: Path) -> tuple[dict[str, StoredTensor], hashlib._Hash]:
    """The tensors by name and a digest over all headers. Raises `ConfigurationError`."""
    index = folder / "model.safetensors.index.json"
    # as transformers has it: one file with everything comes first, and an index beside it is of an older checkpoint
    if not (folder / WHOLE).exists() and index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigurationError(f"{index} has no weight_map", field="model")
        files = sorted({str(name) for name in weight_map.values()})
    else:
        files = [WHOLE]
    tensors: dict[str, StoredTensor] = {}
    digest = hashlib.sha256()
    for name in files:
        if Path(name).name != name:
            raise ConfigurationError(f"{index}: {name!r} leaves the directory", field="model")
        header, stored = _read_header(folder / name)
        digest.update(header)
        tensors.update(stored)
    return tensors, digest


def _check_kind(file: Path) -> None:
    """To open a pipe would take until somebody writes to it."""
    if file.exists() and not file.is_file():
        raise ConfigurationError(f"{file} is no file", field="model")


def _read_header(file: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """A safetensors header, checked against the file's size."""
    _check_kind(file)
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = stream.read(length)
        entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        end = _end_of(entries)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{file.stat().st_size} bytes where its header asks for {8 + length + end}")
        stored = {
            key: StoredTensor(file.name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for key, entry in entries.items()
        }
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}", field="model") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigurationError(f"{file} is no complete safetensors file: {error}", field="model") from error
    return header, stored


def _end_of(entries: dict[str, Any]) -> int:
    """Where the data ends: one tensor behind the other, each as long as its shape says. Raises `ValueError`."""
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = map(int, entry["data_offsets"])
        num_bytes = _BYTES.get(entry["dtype"], 0) * math.prod(entry["shape"])
        if begin != position or end < begin or (num_bytes and end - begin != num_bytes):
            raise ValueError(f"{key} cannot lie at {begin} to {end}")
        position = end
    return position
