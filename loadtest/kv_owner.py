"""The other process of KV benchmarks: it owns a pool that can be written to, and reads from ours when it is told to."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch  # noqa: F401  (without it the pool is not offered through the transfer library)

from common.kv.checksum import slot_digests
from common.kv.geometry import Int64, plan_slots
from common.kv.layout import PoolLayout
from common.kv.link import Link, open_link
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.server import PoolServer


class Owner:
    """The process as the benchmark sees it; `tell` may be called from any thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.offer = GrantOffer.decode(self._answer())

    def reads_from(self, server: PoolServer) -> None:
        """It opens a link into our pool. Blocks, while `server` must be able to answer."""
        self._tell(offer=server.offer.encode())
        self._answer()

    def read(self, slots: list[int]) -> None:
        """It reads these slots of our pool, all layers, into the same slots of its own; returns at once."""
        self._tell(slots=slots)

    def drain(self) -> None:
        """Returns when it has read everything. Blocks."""
        self._tell(drain=True)
        self._answer()

    def _tell(self, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def owner(layout: PoolLayout, device: str = "cpu") -> Iterator[Owner]:
    """A process with a pool of this layout, which ends with the block."""
    command = [sys.executable, "-m", "loadtest.kv_owner", msgspec.json.encode(layout).decode(), device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Owner(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


async def _serve(layout: PoolLayout, device: str) -> None:
    pool = KvPool.create(layout, device, name="owner")
    server = await PoolServer.start(pool, "127.0.0.1", "bench")
    print(server.offer.encode(), flush=True)
    link: Link | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "offer" in told:
            link = await open_link(GrantOffer.decode(told["offer"]), pool)
            print("open", flush=True)
        elif "slots" in told and link is not None:
            await _read(link, pool, np.array(told["slots"]))
        else:
            print("drained", flush=True)
    if link is not None:
        await link.aclose()
    await server.aclose()


async def _read(link: Link, pool: KvPool, slots: Int64) -> None:
    layout = pool.layout
    await link.read(pool, plan_slots(layout, slots, layout, slots, layout.layers, layout.heads))
    slot_digests(pool.memory, layout, slots, layout.layers, layout.heads)


if __name__ == "__main__":
    asyncio.run(_serve(msgspec.json.decode(sys.argv[1], type=PoolLayout), sys.argv[2]))
