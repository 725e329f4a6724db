"""What is measured beside the system runs where the system does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loadtest.baseline import MODES, _generate
from loadtest.serve import device_of

TINY = str(Path(__file__).parents[2] / "models" / "tiny")


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ("", "auto"),
        ("--device cuda --kv-memory 4G", "cuda"),
        ("--token-stages 2 --device=cpu", "cpu"),
        ("--device cpu --device cuda", "cuda"),
    ],
)
def test_the_device_is_the_systems(options: str, device: str) -> None:
    assert device_of(options.split()) == device


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "auto",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_it_generates_there(device: str, tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    file.write_text(json.dumps([[[5, 6, 7], 3], [[8], 2]]))
    figures = _generate(TINY, "float32", device, MODES[0], str(file))
    assert figures["device"] == ("cuda" if device == "auto" else "cpu")
    assert figures["output_tokens_per_s"] > 0
