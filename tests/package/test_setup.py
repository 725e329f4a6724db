"""Setting up where Python lacks ensurepip and pip, as Debian's does without python3-venv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE_PYTHON = """#!/bin/sh
case "$*" in
  "-m venv .venv") mkdir -p .venv; echo "ensurepip is not available" >&2; exit 1;;
  "-m pip "*) echo "No module named pip" >&2; exit 1;;
esac
exec {python} "$@"
"""


def test_a_python_without_ensurepip_gets_pip(tmp_path: Path) -> None:
    # which the one that runs this may lack, too
    wheels = Path(pytest.importorskip("ensurepip").__file__).parent / "_bundled"
    if not list(wheels.glob("pip-*.whl")):
        pytest.skip("this Python brings no wheel of pip to set up from")
    python = tmp_path / "python"
    python.write_text(BARE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "pyproject.toml").touch()
    # everything before the packages are installed
    script = (ROOT / "deploy" / "setup.sh").read_text().partition("\npip=(")[0]
    (tmp_path / "deploy" / "setup.sh").write_text(script)
    environment = os.environ | {"PYTHON": str(python), "WHEELS": str(wheels)}
    done = subprocess.run(
        ["bash", "deploy/setup.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no ensurepip" in done.stderr
    subprocess.run([tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)
