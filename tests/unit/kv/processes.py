"""Owners and writers in processes of their own, for tests that kill and freeze them.

`python -m tests.unit.kv.processes owner` prints its offer and serves; every line on its input is an arrival to verify.
`... writer OFFER` writes without end and says so.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.kv.arrival import Arrival, verify_arrival
from common.kv.geometry import plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, open_link
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from tests.unit.kv.reference import layout

ROOT = Path(__file__).parents[3]
BIG: PoolLayout = layout(num_blocks=256, block_size=16, num_kv_heads=8, head_dim=64)
"""64 MiB: several ZeroMQ messages."""


@dataclass(frozen=True, slots=True)
class Child:
    process: subprocess.Popen[str]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def freeze(self) -> None:
        """Returns when the process stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def child(*arguments: str) -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.kv.processes", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            yield Child(process)
        finally:
            process.kill()


@contextmanager
def owner() -> Iterator[tuple[Child, GrantOffer]]:
    with child("owner") as process:
        yield process, GrantOffer.decode(process.read())


async def serve() -> None:
    pool = KvPool.create(BIG, name="owner")
    server = await PoolServer.start(pool, "127.0.0.1", "first")
    say(server.offer.encode())
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(str(verify_arrival(pool, msgspec.json.decode(line, type=Arrival))))
    await server.aclose()


async def write(offer: GrantOffer) -> None:
    pool = KvPool.create(BIG, name="writer")
    link = await open_link(offer, pool, timeout_s=5.0)
    plan = plan_copies(BIG, range(256), BIG, range(256), (0, 4096), (0, 4))
    while True:
        await link.write(pool, plan)
        say("written")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "owner" else write(GrantOffer.decode(sys.argv[2])))
