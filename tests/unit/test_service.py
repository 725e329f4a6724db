"""What every service does before it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging
from common.service import log_as
log_as("me")
logging.debug("trifle")
logging.info("news")
"""


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("debug", ["me DEBUG trifle", "me INFO news"]),
        ("WARNING", []),
        ("", ["me INFO news"]),
        ("verbose", ["me WARNING DEJAVU_LOG_LEVEL: there is no level 'verbose'; INFO is used", "me INFO news"]),
    ],
)
def test_how_much_is_logged(asked: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"DEJAVU_LOG_LEVEL": asked},
    )  # fmt: skip
    assert [line.split(maxsplit=2)[2] for line in done.stderr.splitlines()] == said
