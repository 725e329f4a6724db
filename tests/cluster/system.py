"""Starts the real system for a test and proves that nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common.process import die_with_parent
from dejavu import AsyncClient

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
START_LIMIT_S = 120


class System:
    """A running `dejavu serve`."""

    def __init__(self, process: subprocess.Popen[str], endpoint: str, log: Path, state_dir: str) -> None:
        self.process = process
        self.endpoint = endpoint
        self.state_dir = state_dir
        self._log = log

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def kill_everything(self) -> None:
        """Returns when no process of it is left: supervisor, etcd, services."""
        below = descendants(self.process.pid)
        self.process.kill()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):  # it died with its parent
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        deadline_s = time.monotonic() + 30
        while left := [pid for pid in below if lives(pid)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.01)


def lives(pid: int) -> bool:
    """Not so a zombie, which waits for a parent that is not ours."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def serve_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dejavu", "serve", *arguments]


@contextlib.contextmanager
def running(*arguments: str, model: str | Path = TINY, state_dir: Path | None = None) -> Iterator[System]:
    """Runs `dejavu serve` with these arguments on a free port; stops it and checks that it exits with 0, and leaves
    nothing behind unless it was killed."""
    with tempfile.TemporaryDirectory(prefix="dejavu-test-") as folder:
        log, temporary = Path(folder, "serve.log"), Path(folder, "tmp")
        temporary.mkdir()
        state = str(state_dir or folder)
        # a test that does not ask for a GPU is about something else, wherever it runs
        device = () if "--device" in arguments else ("--device", "cpu")
        command = serve_command("--port", "0", "--state-dir", state, "--model", str(model), *device, *arguments)
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env=os.environ | {"TMPDIR": str(temporary)}, preexec_fn=die_with_parent,
            )  # fmt: skip
        assert process.stdout is not None
        watchdog = threading.Timer(START_LIMIT_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            watchdog.cancel()
            assert line.startswith("ready tcp://"), f"serve did not start:\n{log.read_text()[-6000:]}"
            system = System(process, line.split()[1].split(",")[0], log, state)
            yield system
            if process.poll() is None:
                assert system.stop() == 0, log.read_text()[-3000:]
            was_killed = process.returncode < 0
            left = [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
            assert was_killed or not left, left
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)
            process.stdout.close()


def descendants(pid: int) -> set[int]:
    """All living processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parent = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


async def pid_of(client: AsyncClient, name: str) -> int:
    """`name` "leader" is the leading router's."""
    services = (await client.status())["services"]
    return next(int(service["pid"]) for service in services if name in (service["name"], service["state"]))
