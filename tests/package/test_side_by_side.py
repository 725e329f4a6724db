"""`make test` runs two processes: neither's failure may be lost, nor what it says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  "-m pytest tests/cluster") echo "the systems"; exit {systems};;
  "-m pytest --ignore=tests/cluster") echo "the others"; exit {others};;
  *) echo "$*"; exit 5;;
esac
"""


def run(folder: Path, systems: int, others: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script with a Python that runs no tests, but ends with these exit codes."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(systems=systems, others=others))
    python.chmod(0o755)
    script = folder / "tests" / "side_by_side.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "tests" / "side_by_side.sh", script)
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("systems", "others", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2), (0, 4, 4)])
def test_both_must_pass_and_both_are_heard(tmp_path: Path, systems: int, others: int, code: int) -> None:
    done = run(tmp_path, systems, others)
    assert done.returncode == code, done.stderr
    assert done.stdout == "the systems\nthe others\n"
    assert ("see above" in done.stderr) == (systems != 0)


def test_what_is_asked_for_runs_alone(tmp_path: Path) -> None:
    done = run(tmp_path, 0, 0, "-k", "swap or kill")
    assert (done.returncode, done.stdout) == (5, "-m pytest -k swap or kill\n")
