"""Whether processes can share a GPU's memory here at all: in some containers, and on parts of a GPU, they cannot.

`python -m tests.unit.kv.sharing` finds out by PyTorch's own way, so that a mistake in ours is not taken for that."""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.unit.kv.processes import ROOT

_NUM_BYTES = 4 << 20


@functools.cache
def can_share_gpu_memory() -> bool:
    """Takes as long as two processes need to begin to use CUDA."""
    command = [sys.executable, "-m", "tests.unit.kv.sharing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() == str(_NUM_BYTES)


def skip_unless_shared() -> None:
    """For tests of what only shared memory can do."""
    if not can_share_gpu_memory():
        pytest.skip("processes cannot share a GPU's memory here")


def _read(memory: torch.Tensor, answers: Any) -> None:
    answers.put(int(memory.sum()))


def _main() -> None:
    context: Any = multiprocessing.get_context("spawn")
    answers, memory = context.SimpleQueue(), torch.ones(_NUM_BYTES, dtype=torch.uint8, device="cuda")
    reader = context.Process(target=_read, args=(memory, answers))
    reader.start()
    reader.join(60)
    reader.kill()
    print("nothing" if answers.empty() else answers.get())  # noqa: T201


if __name__ == "__main__":
    _main()
