"""The first start on a machine, which has to compile: it can be stopped meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.process import die_with_parent
from tests.cluster.system import ROOT, descendants, serve_command

pytestmark = pytest.mark.cluster

COMPILER = """#!/bin/sh
# its own child does the work, as with real ones
sleep 1000
"""
START_LIMIT_S = 60
STOP_LIMIT_S = 2.0


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=len)
def test_a_stop_while_kernels_are_compiled_is_quick_and_leaves_nothing(
    numbers: Sequence[signal.Signals], tmp_path: Path
) -> None:
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o700)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = serve_command("--port", "0", "--device", "cpu", "--state-dir", str(tmp_path / "state"))
    # the store needs the compiler, too, and would keep it from the stages
    command += ["--token-stages", "2", "--cache-stores", "0"]
    with log.open("w") as errors:
        serve = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=errors, start_new_session=True, preexec_fn=die_with_parent
        )
    below: set[int] = set()
    try:
        wait_for(log, "INFO waiting for another process that compiles kernels.c", "INFO compiling kernels.c")
        below = descendants(serve.pid)
        asked_s = time.monotonic()
        for number in numbers:
            serve.send_signal(number)
        assert serve.wait(timeout=30) == 0
        assert time.monotonic() - asked_s < STOP_LIMIT_S
        assert not [pid for pid in below if is_running(pid)]
    finally:
        for pid in filter(is_running, below):
            os.kill(pid, signal.SIGKILL)
        serve.kill()
        serve.wait()


def wait_for(log: Path, *texts: str) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while not all(text in log.read_text() for text in texts):
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not so a zombie, which somebody else has yet to wait for."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes() != b""
    except OSError:
        return False
