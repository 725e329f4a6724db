"""A pool that others may write to: one thread that opens both doors, so that a busy event loop delays
nobody."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import zmq

from common.kv.errors import LinkLost
from common.kv.fence import Authority, Fence
from common.kv.memory_door import MemoryDoor
from common.kv.offer import CudaMemory, GrantOffer, host_id
from common.kv.pool import KvPool
from common.kv.zmq_door import ZmqDoor

if TYPE_CHECKING:
    from common.kv.nixl_agent import NixlGrant

logger = logging.getLogger(__name__)


class PoolServer:
    """Grants a pool to whoever has its `offer`. Close it before the pool."""

    def __init__(self, pool: KvPool, host: str, incarnation: str, port: int) -> None:
        self._nixl = _nixl_grant(pool)
        self._fence = Fence()
        self._work: deque[Callable[[], None]] = deque()
        """for the thread"""
        self._fencing: list[tuple[Fence, Future[None]]] = []
        self._zmq_door = ZmqDoor(pool, self._fence, host, port, None if self._nixl is None else self._nixl.memory)
        cuda = _exported(pool)
        can_share = (pool.fd is not None or cuda is not None) and sys.platform == "linux"
        self._memory_door = MemoryDoor(pool, self._fence, cuda) if can_share else None
        self.offer = GrantOffer(
            name=pool.name,
            incarnation=incarnation,
            layout=pool.layout,
            host_id=host_id(),
            zmq_endpoint=self._zmq_door.endpoint,
            token=secrets.token_bytes(16),
            memory_address=None if self._memory_door is None else self._memory_door.address,
            gpu_id=None if cuda is None else cuda.gpu_id,
            has_nixl=self._nixl is not None,
        )
        self._wake, self._woken = socket.socketpair()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-server")
        self._serving = self._executor.submit(self._serve)

    @classmethod
    async def start(cls, pool: KvPool, host: str, incarnation: str, *, port: int = 0) -> PoolServer:
        """Listens on `host`, an address that writers reach, and on `port`, 0: any free one. Raises
        `zmq.ZMQError`."""
        return cls(pool, host, incarnation, port)

    @property
    def peers(self) -> dict[str, str]:
        """Who may write to the pool or read from it at present, and over which link."""
        memory = [] if self._memory_door is None else self._memory_door.peers
        return {hello.name: hello.link for hello in [*self._zmq_door.peers, *memory]}

    async def fence(self, oldest: Authority) -> None:
        """Nobody is let in any more under older epochs than these. When it returns, nothing that was opened under older
        ones changes the pool, for ever. That takes until writers that cannot be refused (they have the memory, or the
        transfer library writes for them) have ended: for ever, if one stands still. Raises `LinkLost` once closed."""
        done: Future[None] = Future()
        self._have_done(lambda: self._raise_fence(oldest, done))
        await asyncio.wrap_future(done)

    async def bury(self, name: str) -> None:
        """Who has this name in its authority is dead, so that nothing of it is under way. Raises `LinkLost` once
        closed."""
        self._have_done(lambda: self._zmq_door.bury(name))

    def _have_done(self, work: Callable[[], None]) -> None:
        if self._wake.fileno() < 0:
            raise LinkLost(f"{self.offer.name} is closed")
        self._work.append(work)
        self._wake.send(b"\0")

    async def aclose(self) -> None:
        """Writers see their links end. Idempotent."""
        if self._wake.fileno() < 0:
            return
        self._wake.close()
        try:
            await asyncio.wrap_future(self._serving)
        finally:
            self._executor.shutdown(wait=False)

    def _serve(self) -> None:
        try:
            while self._serve_once():
                pass
        finally:
            self._woken.close()
            while self._work:
                self._work.popleft()()
            for _, done in self._fencing:
                done.cancel()
            self._zmq_door.close()
            if self._nixl is not None:
                self._nixl.close(self._zmq_door.has_one_sided_writers)
            if self._memory_door is not None:
                self._memory_door.close()

    def _serve_once(self) -> bool:
        """Waits for something to do and does it; False: it is time to stop."""
        poller = zmq.Poller()
        poller.register(self._zmq_door.socket, zmq.POLLIN)
        for fileno in [self._woken.fileno(), *(self._memory_door.filenos if self._memory_door else [])]:
            poller.register(fileno, zmq.POLLIN)
        for ready, _ in poller.poll():
            if ready == self._woken.fileno():
                if not self._woken.recv(1):
                    return False
                self._work.popleft()()
            elif ready == self._zmq_door.socket:
                self._zmq_door.on_readable(self.offer)
            elif self._memory_door is not None and isinstance(ready, int):
                self._memory_door.on_readable(ready, self.offer)
        self._tell_who_waits()
        return True

    def _raise_fence(self, oldest: Authority, done: Future[None]) -> None:
        self._fence.raise_to(oldest)
        self._zmq_door.shut_out()
        if self._memory_door is not None:
            self._memory_door.ask_to_leave()
        self._fencing.append((Fence(oldest), done))

    def _tell_who_waits(self) -> None:
        waiting, self._fencing = self._fencing, []
        for fence, done in waiting:
            if not (
                self._zmq_door.is_clear(fence) and (self._memory_door is None or self._memory_door.is_clear(fence))
            ):
                self._fencing.append((fence, done))
            elif done.set_running_or_notify_cancel():
                done.set_result(None)


def _nixl_grant(pool: KvPool) -> NixlGrant | None:
    """None where the library is missing, or torch, which it is used through, has not been loaded, or where it does not
    take the memory."""
    if "torch" not in sys.modules:
        return None
    from common.kv.nixl_agent import NixlGrant, nixl_module

    try:
        return NixlGrant(pool) if nixl_module() else None
    except LinkLost as error:
        # it may know no way to the memory of a GPU; other links serve
        logger.warning("%s is not offered through the transfer library: %s", pool.name, error)
        return None


def _exported(pool: KvPool) -> CudaMemory | None:
    if pool.is_host or pool.device.type != "cuda":
        return None
    from common.kv.cuda_driver import export_memory

    try:
        return export_memory(pool.arena)
    except LinkLost as error:
        # in some containers, or where PyTorch was told to use expandable segments; other links serve
        logger.warning("the GPU memory of %s cannot be shared, so its KV passes through the host: %s", pool.name, error)
        return None
