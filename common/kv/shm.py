"""The link for pools in host memory on one host: the writer maps the owner's memory and copies by itself."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from concurrent.futures import Executor, Future

import numpy as np

from common.kv.copies import copy_pieces
from common.kv.errors import LinkRefused, LinkTimeout
from common.kv.fence import Authority
from common.kv.geometry import CopyPlan
from common.kv.memory_door import Entrance, Watch, ended, enter, entered
from common.kv.offer import GrantOffer
from common.kv.pool import Bytes, KvPool, map_present_memory


class ShmLink:
    """The writer's side. Copies run in `executor`, or in the calling thread where there is none."""

    name = "shm"

    def __init__(
        self, offer: GrantOffer, entrance: Entrance, memory: Bytes, executor: Executor | None, timeout_s: float
    ) -> None:
        self._offer = offer
        self._memory = memory
        self._executor = executor
        self._timeout_s = timeout_s
        self._copies: set[Future[None]] = set()
        self._owner = Watch(entrance.connection, offer.name, self._copies, self._forget)

    @classmethod
    async def open(
        cls, offer: GrantOffer, pool: KvPool, executor: Executor | None, timeout_s: float, authority: Authority
    ) -> ShmLink:
        """Raises `ConnectionRefusedError` where nobody listens (another host or network namespace),
        `LinkRefused`, `LinkTimeout` or `LinkLost`."""
        entrance, memory = await entered(lambda: _enter(offer, pool, timeout_s, authority), _abandon)
        return cls(offer, entrance, memory, executor, timeout_s)

    @property
    def is_over(self) -> bool:
        """See `Link.is_over`."""
        return not self._owner.is_open

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`."""
        self._owner.check_open()
        await self._copy(plan, source.memory, self._memory)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`."""
        self._owner.check_open()
        await self._copy(plan, self._memory, destination.memory)

    async def aclose(self) -> None:
        """See `Link.aclose`; a copy cannot be stuck, so this always succeeds."""
        self._owner.close()
        await ended(self._copies)

    async def _copy(self, plan: CopyPlan, source: Bytes, destination: Bytes) -> None:
        if self._executor is None:
            copy_pieces(plan, source, destination)
        else:
            await self._copy_elsewhere(self._executor, plan, source, destination)
        # the owner may have died meanwhile; then the bytes lie in, or come from, memory that nobody keeps
        self._owner.check()

    async def _copy_elsewhere(self, executor: Executor, plan: CopyPlan, source: Bytes, destination: Bytes) -> None:
        copy = executor.submit(copy_pieces, plan, source, destination)
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(asyncio.wrap_future(copy))
        except TimeoutError:
            message = f"no thread had time for {self._offer.name} within {self._timeout_s} s"
            raise LinkTimeout(message) from None
        finally:
            # a copy that has begun cannot be stopped, but it takes no longer than a copy takes
            if not copy.cancel():
                await ended([copy])

    def _forget(self) -> None:
        held, self._memory = [self._memory], np.empty(0, dtype=np.uint8)
        # who maps a dead process's memory last gives back all its pages: tens of milliseconds, not on the event loop
        threading.Thread(target=held.clear, name="unmap").start()


def _enter(offer: GrantOffer, pool: KvPool, timeout_s: float, authority: Authority) -> tuple[Entrance, Bytes]:
    """The handshake, and the mapping with all its pages; blocks."""
    entrance = enter(offer, pool, ShmLink.name, timeout_s, authority)
    try:
        return entrance, _map(entrance.fd, offer)
    except BaseException:
        entrance.connection.close()
        raise
    finally:
        if entrance.fd is not None:
            os.close(entrance.fd)


def _map(fd: int | None, offer: GrantOffer) -> Bytes:
    # a memory that could shrink would kill whoever touches the missing part
    is_sealed = fd is not None and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    if fd is None or not is_sealed or os.fstat(fd).st_size != offer.layout.total_bytes:
        raise LinkRefused(f"{offer.name} sent no sealed memory of {offer.layout.total_bytes} bytes")
    return np.frombuffer(map_present_memory(fd, offer.layout.total_bytes), dtype=np.uint8)


def _abandon(opened: tuple[Entrance, Bytes]) -> None:
    opened[0].connection.close()
