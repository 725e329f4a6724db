"""Owners and writers in processes of their own, for tests that kill and freeze them.

`python -m tests.unit.kv.processes owner [--port N] [--incarnation NAME] [--device NAME]` prints its offer and serves;
every line on its input is an arrival to verify.
`... writer OFFER [--epoch N] [--device NAME]` writes and says so until the owner is gone, then whether its own pool is
as good as before. `... spiller DIRECTORY` stores one file after the other under the same key, each full of one byte.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.kv.arrival import Arrival, verify_arrival
from common.kv.file_store import FileStore
from common.kv.geometry import plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, LinkError, LinkLost, open_link
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
def owner(*arguments: str) -> Iterator[tuple[Child, GrantOffer]]:
    with child("owner", *arguments) as process:
        yield process, GrantOffer.decode(process.read())


async def until(is_so: Callable[[], bool]) -> None:
    """For what other threads and the kernel do in their own time."""
    async with asyncio.timeout(5.0):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def serve(port: int, incarnation: str, device: str) -> None:
    pool = KvPool.create(BIG, device, name="owner")
    server = await PoolServer.start(pool, "127.0.0.1", incarnation, port=port)
    say(server.offer.encode())
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(str(verify_arrival(pool, msgspec.json.decode(line, type=Arrival))))
    await server.aclose()


async def write(offer: GrantOffer, epoch: int, device: str) -> None:
    pool = KvPool.create(BIG, device, name="writer")
    link = await open_link(offer, pool, authority={"prompt-0": epoch}, timeout_s=5.0)
    plan = plan_copies(BIG, range(256), BIG, range(256), (0, 4096), (0, 4))
    with suppress(LinkLost):
        while True:
            await link.write(pool, plan)
            say("written")
    with suppress(LinkError):
        await link.aclose()
    pool.arena.fill_(3)
    say("sound" if bool((pool.arena == 3).all()) else "damaged")


async def spill(directory: str) -> None:
    store = await FileStore.start(Path(directory), max_bytes=1 << 30)
    pool = KvPool.create(BIG, name="spiller")
    plan = plan_copies(BIG, range(256), BIG, range(256), (0, 4096), (0, 4))
    for number in itertools.count():
        pool.memory[:] = number % 256
        link = await store.create("key", BIG)
        await link.write(pool, plan)
        await store.finish(link, "key")
        await link.aclose()
        say("finished")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["owner", "writer", "spiller"])
    parser.add_argument("place", nargs="?")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--incarnation", default="first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epoch", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.role == "owner":
        asyncio.run(serve(arguments.port, arguments.incarnation, arguments.device))
    elif arguments.role == "writer":
        asyncio.run(write(GrantOffer.decode(arguments.place), arguments.epoch, arguments.device))
    else:
        asyncio.run(spill(arguments.place))


if __name__ == "__main__":
    main()
