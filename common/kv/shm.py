"""The link for pools on one host: the writer maps the owner's memory and copies into it.

The owner listens on an abstract Unix socket, which leaves no file behind, and passes the pool's memfd to a
writer that runs as the same user and has the token. The connection stays open; its end tells each side that
the other is gone."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import struct
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import msgspec
import numpy as np

from common.kv.copies import check_plan, copy_pieces
from common.kv.errors import LinkLost, LinkRefused, LinkTimeout
from common.kv.geometry import CopyPlan
from common.kv.offer import PROTOCOL_VERSION, GrantOffer, Hello, Welcome, check_answer, judge
from common.kv.pool import Bytes, KvPool, map_memory

_MAX_MESSAGE_BYTES = 64 << 10
_MAX_WRITERS = 256
_PEER_CREDENTIALS = struct.Struct("3i")


class MemoryDoor:
    """The owner's side: the socket that hands out one pool's memory. Never blocks; the caller polls
    `filenos`."""

    def __init__(self, pool: KvPool) -> None:
        self.address = f"dejavu-kv-{secrets.token_hex(16)}"
        self._pool = pool
        self._writers: dict[int, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(_MAX_WRITERS)

    @property
    def filenos(self) -> list[int]:
        """What to poll for reading."""
        return [self._listener.fileno(), *self._writers]

    def on_readable(self, fileno: int, offer: GrantOffer) -> None:
        """Serves one of `filenos` that can be read."""
        if fileno == self._listener.fileno():
            self._accept()
        elif fileno in self._writers and not self._answer(self._writers[fileno], offer):
            self._writers.pop(fileno).close()

    def close(self) -> None:
        self._listener.close()
        for writer in self._writers.values():
            writer.close()

    def _accept(self) -> None:
        try:
            writer, _ = self._listener.accept()
        except OSError:
            return  # it gave up before it was let in
        credentials = writer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
        if uid != os.geteuid() or len(self._writers) >= _MAX_WRITERS:
            writer.close()
            return
        writer.setblocking(False)
        self._writers[writer.fileno()] = writer

    def _answer(self, writer: socket.socket, offer: GrantOffer) -> bool:
        """False: this writer is gone, or not wanted."""
        try:
            hello = msgspec.msgpack.decode(writer.recv(_MAX_MESSAGE_BYTES), type=Hello)
            answer = judge(hello, offer)
            frame = msgspec.msgpack.encode(answer)
            fds = [self._pool.fd] if isinstance(answer, Welcome) and self._pool.fd is not None else []
            socket.send_fds(writer, [frame], fds)
        except (OSError, msgspec.DecodeError):
            return False
        return bool(fds)


@dataclass(frozen=True, slots=True)
class _Entrance:
    """What the handshake brought: the open connection and the owner's memory."""

    connection: socket.socket
    memory: Bytes


class ShmLink:
    """The writer's side. Copies run in `executor`, or in the calling thread where there is none."""

    name = "shm"

    def __init__(self, offer: GrantOffer, entrance: _Entrance, executor: Executor | None, timeout_s: float) -> None:
        self._offer = offer
        self._connection = entrance.connection
        self._memory: Bytes | None = entrance.memory
        self._executor = executor
        self._timeout_s = timeout_s
        self._copies: set[Future[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection, self._on_readable)

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool, executor: Executor | None, timeout_s: float) -> ShmLink:
        """Raises `ConnectionRefusedError` where nobody listens (another host or network namespace),
        `LinkRefused`, `LinkTimeout` or `LinkLost`."""
        entering = asyncio.ensure_future(asyncio.to_thread(_enter, offer, pool, timeout_s))
        try:
            entrance = await asyncio.shield(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(_abandon)
            raise
        return cls(offer, entrance, executor, timeout_s)

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`."""
        memory = self._entered()
        check_plan(plan, source.layout.total_bytes, len(memory))
        await self._copy(plan, source.memory, memory)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`."""
        memory = self._entered()
        check_plan(plan, len(memory), destination.layout.total_bytes)
        await self._copy(plan, memory, destination.memory)

    async def aclose(self) -> None:
        """See `Link.aclose`; a copy cannot be stuck, so this always succeeds."""
        self._close()
        await _ended(self._copies)

    def _entered(self) -> Bytes:
        if self._memory is None:
            raise self._lost()
        return self._memory

    async def _copy(self, plan: CopyPlan, source: Bytes, destination: Bytes) -> None:
        if self._executor is None:
            copy_pieces(plan, source, destination)
        else:
            await self._copy_elsewhere(self._executor, plan, source, destination)
        # the owner may have died meanwhile; then the bytes lie in, or come from, memory that nobody keeps
        if self._memory is None or self._is_over():
            self._close()
            raise self._lost()

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
                await _ended([copy])

    def _on_readable(self) -> None:
        if self._is_over():
            self._close()

    def _is_over(self) -> bool:
        """The owner never says anything after the handshake, so all there can be to read is its end."""
        try:
            self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _close(self) -> None:
        if self._memory is not None:
            self._memory = None
            self._loop.remove_reader(self._connection)
            self._connection.close()

    def _lost(self) -> LinkLost:
        return LinkLost(f"{self._offer.name} is gone, or the link to it was closed")


async def _ended(copies: Iterable[Future[None]]) -> None:
    """Waits for copies, cancelled or not: what they touch must be free afterwards."""
    waiting = [asyncio.wrap_future(copy) for copy in copies]
    while not all(copy.done() for copy in waiting):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(waiting)


def _enter(offer: GrantOffer, pool: KvPool, timeout_s: float) -> _Entrance:
    """The handshake, and the mapping with all its pages; blocks."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{offer.memory_address}")
        hello = Hello(PROTOCOL_VERSION, offer.token, pool.name, pool.layout, "shm")
        connection.send(msgspec.msgpack.encode(hello))
        memory = _receive_memory(connection, offer)
        connection.setblocking(False)
    except ConnectionRefusedError:
        connection.close()
        raise
    except TimeoutError:
        connection.close()
        raise LinkTimeout(f"{offer.name} did not answer within {timeout_s} s") from None
    except OSError as error:
        connection.close()
        raise LinkLost(f"{offer.name} went away during the handshake: {error}") from error
    except BaseException:
        connection.close()
        raise
    return _Entrance(connection, memory)


def _receive_memory(connection: socket.socket, offer: GrantOffer) -> Bytes:
    frame, fds, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 1)
    try:
        if not frame:
            raise LinkRefused(f"{offer.name} runs as another user, or has too many writers")
        check_answer(frame, offer)
        # a memory that could shrink would kill whoever touches the missing part
        is_sealed = bool(fds) and fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not is_sealed or os.fstat(fds[0]).st_size != offer.layout.total_bytes:
            raise LinkRefused(f"{offer.name} sent no sealed memory of {offer.layout.total_bytes} bytes")
        return np.frombuffer(map_memory(fds[0], offer.layout.total_bytes), dtype=np.uint8)
    finally:
        for fd in fds:
            os.close(fd)


def _abandon(entering: asyncio.Future[_Entrance]) -> None:
    if not entering.cancelled() and entering.exception() is None:
        entering.result().connection.close()
