"""How fast KV moves on this GPU, printed; and that it is no slower than it can be excused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.kv.processes import ROOT
from tests.unit.kv.sharing import can_share_gpu_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rate(cell: dict[str, Any], way: str) -> float:
    return float(cell["ways"][way]["best_gb_per_s"])


def test_links_and_swaps_beside_a_device_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "loadtest.gpu_bench", "--json", str(file), "--runs", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with capsys.disabled():
        print("\n" + done.stdout)  # noqa: T201 - what `make gpu-check` is asked to show
    figures = json.loads(file.read_text())
    if can_share_gpu_memory():
        assert figures["handoff"]["link"] == "cuda_ipc"
        largest = max(figures["links"], key=lambda cell: int(cell["size_bytes"]))["ways"]
        for way in ("cuda_ipc write", "cuda_ipc read"):
            # twice the copy, and the changes of threads, which take longer than the copy of a quarter of a gigabyte
            assert largest[way]["best_us"] < 2 * largest["device copy"]["best_us"] + 1000
    in_a_row = figures["swaps"][0]
    assert rate(in_a_row, "in") > 0.5 * rate(in_a_row, "host to device")
    assert rate(in_a_row, "out") > 0.5 * rate(in_a_row, "device to host")
