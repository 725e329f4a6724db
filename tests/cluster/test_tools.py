"""The other ways to start the system and to load it: honcho and locust, as a user types them."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dejavu import Client, SamplingParams
from dejavu.errors import DejavuError
from tests.cluster.system import ROOT, descendants, lives

pytestmark = pytest.mark.cluster

needs_locust = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
ENOUGH_STARTED = 4
"""`dejavu serve`, its etcd, what forks its stages, and the first service"""


def locust(endpoint: str, folder: Path, run_time: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Runs it headless; its exit code and its table of figures by name."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "-u", "4", "-r", "4"]
    command += ["-t", run_time, "--host", endpoint, "--csv", str(folder / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    with (folder / "run_stats.csv").open() as file:
        return done.returncode, {row["Name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the system that honcho runs. Ctrl-C leaves nothing of it behind."""
    folder = tmp_path_factory.mktemp("honcho")
    port, etcd_port = free_ports()
    environment = os.environ | {
        "PYTHON": sys.executable,
        "DEJAVU_ETCD_DATA": str(folder / "etcd"),
        "DEJAVU_PORT": str(port),
        "DEJAVU_ETCD_PORT": str(etcd_port),
    }
    log = folder / "log"
    with log.open("w") as output:
        honcho = subprocess.Popen(
            [sys.executable, "-m", "honcho", "start"], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    try:
        assert completion_at(f"tcp://127.0.0.1:{port}", honcho), log.read_text()
        below = descendants(honcho.pid)
        assert len(below) >= 4
        yield f"tcp://127.0.0.1:{port}"
    finally:
        honcho.send_signal(signal.SIGINT)
        honcho.wait(timeout=30)
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]


def test_honcho_runs_the_same_system(endpoint: str) -> None:
    with Client(endpoint) as client:
        assert len(client.generate("It was a fine morning", GREEDY).token_ids) == GREEDY.max_tokens


@needs_locust
def test_locust_loads_a_running_system(endpoint: str, tmp_path: Path) -> None:
    code, rows = locust(endpoint, tmp_path, "4s")
    assert code == 0
    for name in ("generate", "TTFT", "TPOT"):
        assert int(rows[name]["Request Count"]) > 0
        assert int(rows[name]["Failure Count"]) == 0
    assert float(rows["TTFT"]["Average Response Time"]) < float(rows["generate"]["Average Response Time"])


@needs_locust
def test_locust_fails_where_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        code, rows = locust(f"tcp://127.0.0.1:{reserved.getsockname()[1]}", tmp_path, "6s")
    assert code == 1
    assert int(rows["connect"]["Failure Count"]) == 4


def test_a_load_test_that_is_told_to_end_ends_its_system(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "loadtest.chaos", "--json", str(tmp_path / "file"), "--fault", "token-kill"]
    chaos = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(temporary)})
    below: set[int] = set()
    try:
        while len(below) < ENOUGH_STARTED:
            assert chaos.poll() is None
            below = descendants(chaos.pid)
        chaos.terminate()
        assert chaos.wait(timeout=30) == 128 + signal.SIGTERM
        assert not [pid for pid in below if lives(pid)]
        assert not list(temporary.iterdir())
    finally:
        chaos.kill()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def free_ports() -> tuple[int, int]:
    """One for clients, and one for etcd with the next one free, too."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port = int(second.getsockname()[1])
            try:
                third.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return int(first.getsockname()[1]), port


def completion_at(endpoint: str, honcho: subprocess.Popen[bytes]) -> bool:
    """Whether the system answers before honcho ends (bounded by the test's timeout)."""
    while honcho.poll() is None:
        try:
            with Client(endpoint, connect_timeout_s=1.0) as client:
                return len(client.generate("It was a fine morning", GREEDY).token_ids) == GREEDY.max_tokens
        except DejavuError:
            continue
    return False
