"""A few of the kills of which `make kv-kills` does a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.kv.processes import ROOT


def test_kills_at_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.kv_kills", "--runs", "20", "--json", str(tmp_path / "kills.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "kills.json").read_text())
    assert results["num_runs"] == 20 and results["num_in_transfer"] > 0
    assert results["wrong"] == [] and results["left_in_dev_shm"] == []
