"""`make gpu-check` must not hide what fails, and must not fail where there is no GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *"-m pytest -m gpu"*) exit {tests};;
  *"print(torch.cuda.is_available())"*) {device};;
  *get_device_name*) echo "a GPU";;
  *) exit 0;;
esac
"""


@pytest.mark.parametrize(
    ("sees_cuda", "tests", "code"), [("True", 0, 0), ("True", 1, 1), ("True", 2, 2), ("False", 1, 0), ("", 0, 1)]
)
def test_its_exit_code_is_that_of_the_tests(tmp_path: Path, sees_cuda: str, tests: int, code: int) -> None:
    # a Python that has everything; only what it says about the device and the tests differs
    device = f"echo {sees_cuda}" if sees_cuda else "exit 1"
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(tests=tests, device=device))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "deploy/gpu_check.sh"], cwd=ROOT, env=os.environ | {"PYTHON": str(python)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert ("nothing to check" in done.stdout) == (sees_cuda == "False")
