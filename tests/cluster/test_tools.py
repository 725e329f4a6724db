"""The other ways to start the system and to load it: honcho and locust, as a user types them."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dejavu import Client, SamplingParams
from dejavu.errors import DejavuError
from tests.cluster.system import ROOT, descendants, running

pytestmark = pytest.mark.cluster

needs_locust = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def locust(endpoint: str, folder: Path, run_time: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Runs it headless; its exit code and its table of figures by name."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "-u", "4", "-r", "4"]
    command += ["-t", run_time, "--host", endpoint, "--csv", str(folder / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    with (folder / "run_stats.csv").open() as file:
        return done.returncode, {row["Name"]: row for row in csv.DictReader(file)}


@needs_locust
def test_locust_loads_a_running_system(tmp_path: Path) -> None:
    with running("--kv-memory", "16M") as system:
        code, rows = locust(system.endpoint, tmp_path, "5s")
    assert code == 0
    for name in ("generate", "TTFT", "TPOT"):
        assert int(rows[name]["Request Count"]) > 0
        assert int(rows[name]["Failure Count"]) == 0
    assert float(rows["TTFT"]["Average Response Time"]) < float(rows["generate"]["Average Response Time"])


@needs_locust
def test_locust_fails_where_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        code, rows = locust(f"tcp://127.0.0.1:{reserved.getsockname()[1]}", tmp_path, "8s")
    assert code == 1
    assert int(rows["connect"]["Failure Count"]) == 4


def test_honcho_runs_the_same_system(tmp_path: Path) -> None:
    port, etcd_port = free_ports()
    environment = os.environ | {
        "PYTHON": sys.executable,
        "DEJAVU_ETCD_DATA": str(tmp_path / "etcd"),
        "DEJAVU_PORT": str(port),
        "DEJAVU_ETCD_PORT": str(etcd_port),
    }
    log = tmp_path / "log"
    with log.open("w") as output:
        honcho = subprocess.Popen(
            [sys.executable, "-m", "honcho", "start"], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    try:
        assert completion_at(f"tcp://127.0.0.1:{port}", honcho), log.read_text()
        below = descendants(honcho.pid)
        assert len(below) >= 4
    finally:
        honcho.send_signal(signal.SIGINT)
        honcho.wait(timeout=30)
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]


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
