"""How a pool's memory gets from its owner to a writer on the same host.

The owner listens on an abstract Unix socket, which leaves no file behind, and passes the pool's memfd, or the handle of
its GPU memory, to a writer that runs as the same user and has the token. The connection stays open; its end tells each
side that the other is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from common.kv.errors import LinkLost, LinkRefused, LinkTimeout
from common.kv.fence import Authority, Fence
from common.kv.offer import HELLO, PROTOCOL_VERSION, CudaMemory, GrantOffer, Hello, Welcome, check_answer, judge
from common.kv.pool import KvPool, retire

Result = TypeVar("Result")

_MAX_MESSAGE_BYTES = 64 << 10
_MAX_WRITERS = 256
_PEER_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True)
class _Writer:
    connection: socket.socket
    authority: Authority = field(default_factory=dict)
    hello: Hello | None = None
    """None: it has not been let in."""


class MemoryDoor:
    """The owner's side: the socket that hands out one pool's memory (on a GPU: `cuda`). Never blocks; the caller polls
    `filenos`."""

    def __init__(self, pool: KvPool, fence: Fence, cuda: CudaMemory | None = None) -> None:
        self.address = f"dejavu-kv-{secrets.token_hex(16)}"
        self._pool = pool
        self._fence = fence
        self._cuda = cuda
        self._writers: dict[int, _Writer] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(_MAX_WRITERS)

    @property
    def filenos(self) -> list[int]:
        """What to poll for reading."""
        return [self._listener.fileno(), *self._writers]

    @property
    def peers(self) -> list[Hello]:
        """Who was let in and has not left; from any thread."""
        return [writer.hello for writer in list(self._writers.values()) if writer.hello is not None]

    def on_readable(self, fileno: int, offer: GrantOffer) -> None:
        """Serves one of `filenos` that can be read."""
        if fileno == self._listener.fileno():
            self._accept()
        elif fileno in self._writers and not self._answer(self._writers[fileno], offer):
            self._writers.pop(fileno).connection.close()

    def ask_to_leave(self) -> None:
        """Tells the writers that the fence stops. They close their end once no copy of theirs is running; so does the
        kernel for one that dies. A process that stands still does neither, and may go on copying when it wakes up."""
        for writer in self._writers.values():
            if self._fence.stops(writer.authority):
                with contextlib.suppress(OSError):
                    writer.connection.shutdown(socket.SHUT_WR)

    def is_clear(self, fence: Fence) -> bool:
        """Whether nobody whom this fence stops has the memory any more."""
        return not any(fence.stops(writer.authority) for writer in self._writers.values())

    def close(self) -> None:
        """GPU memory that a writer has open stays where it is for good: the writer may be copying into it."""
        self._listener.close()
        if self._cuda is not None and self._writers:
            retire(self._pool)
        for writer in self._writers.values():
            writer.connection.close()
        self._writers.clear()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it gave up before it was let in
        _, uid = _peer(connection)
        if uid != os.geteuid() or len(self._writers) >= _MAX_WRITERS:
            connection.close()
            return
        connection.setblocking(False)
        self._writers[connection.fileno()] = _Writer(connection)

    def _answer(self, writer: _Writer, offer: GrantOffer) -> bool:
        """False: this writer is gone, or not wanted."""
        try:
            hello = HELLO.decode(writer.connection.recv(_MAX_MESSAGE_BYTES))
            answer = judge(hello, offer, self._fence)
            is_welcome = isinstance(answer, Welcome)
            if isinstance(answer, Welcome):
                answer = msgspec.structs.replace(answer, cuda=self._cuda)
                writer.authority, writer.hello = hello.authority, hello
            fds = [self._pool.fd] if is_welcome and self._pool.fd is not None else []
            socket.send_fds(writer.connection, [msgspec.msgpack.encode(answer)], fds)
        except (OSError, msgspec.DecodeError):
            return False
        return is_welcome


@dataclass(frozen=True, slots=True)
class Entrance:
    """What the handshake brought: the open connection, the owner's answer, and a memfd that is now ours."""

    connection: socket.socket
    welcome: Welcome
    fd: int | None

    def close(self) -> None:
        self.connection.close()
        if self.fd is not None:
            os.close(self.fd)


def enter(offer: GrantOffer, pool: KvPool, link: str, timeout_s: float, authority: Authority | None = None) -> Entrance:
    """The handshake; blocks. Raises `ConnectionRefusedError` where nobody listens (another network namespace),
    `LinkRefused`, `LinkTimeout` or `LinkLost`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{offer.memory_address}")
        hello = Hello(PROTOCOL_VERSION, offer.token, pool.name, pool.layout, link, dict(authority or {}))
        connection.send(msgspec.msgpack.encode(hello))
        welcome, fd = _receive(connection, offer)
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
    return Entrance(connection, welcome, fd)


async def entered(work: Callable[[], Result], undo: Callable[[Result], None]) -> Result:
    """What `work` brings, which blocks for a handshake; where nobody waits for it any more, `undo` gets that."""
    entering = asyncio.ensure_future(asyncio.to_thread(work))

    def give_back(done: asyncio.Future[Result]) -> None:
        if not done.cancelled() and done.exception() is None:
            undo(done.result())

    try:
        return await asyncio.shield(entering)
    except asyncio.CancelledError:
        entering.add_done_callback(give_back)
        raise


def owner_pid(connection: socket.socket) -> int:
    """The process that listens at the other end."""
    return _peer(connection)[0]


class Watch:
    """A writer's look at the connection after the handshake: the owner never says anything more, so all there can be to
    read is its end. `on_end` is called once, on the event loop that made this.

    Our end of the connection stays open as long as one of `copies` is running: the owner takes its end for the end of
    all that we write."""

    def __init__(
        self,
        connection: socket.socket,
        owner_name: str,
        copies: Collection[Future[None]],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._owner_name = owner_name
        self._copies = copies
        self._on_end = on_end
        self._closing: asyncio.Task[None] | None = None
        self._is_open = True
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._look)

    @property
    def is_open(self) -> bool:
        """Whether the owner is alive at this moment, and the link not closed."""
        self._look()
        return self._is_open

    def check(self) -> None:
        """Raises `LinkLost` unless the owner is alive at this moment."""
        self._look()
        self.check_open()

    def check_open(self) -> None:
        """Raises `LinkLost` where the end has been seen already."""
        if not self._is_open:
            raise LinkLost(f"{self._owner_name} is gone, or the link to it was closed")

    def close(self) -> None:
        """Idempotent."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._connection)
            if self._copies:
                self._closing = self._loop.create_task(self._close_behind(list(self._copies)))
            else:
                self._connection.close()
            self._on_end()

    async def _close_behind(self, copies: Iterable[Future[None]]) -> None:
        await ended(copies)
        self._connection.close()

    def _look(self) -> None:
        if self._is_open and self._poller.poll(0):
            self.close()


async def ended(copies: Iterable[Future[None]]) -> None:
    """Waits for copies, cancelled or not: what they touch must be free afterwards."""
    waiting = [asyncio.wrap_future(copy) for copy in copies]
    while not all(copy.done() for copy in waiting):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(waiting)


def _receive(connection: socket.socket, offer: GrantOffer) -> tuple[Welcome, int | None]:
    frame, fds, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 1)
    try:
        if not frame:
            raise LinkRefused(f"{offer.name} runs as another user, or has too many writers")
        return check_answer(frame, offer), fds[0] if fds else None
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    return pid, uid
