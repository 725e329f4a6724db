"""How a pool's memory gets from its owner to a writer on the same host.

The owner listens on an abstract Unix socket, which leaves no file behind, and passes the pool's memfd, or the handle of
its GPU memory, to a writer that runs as the same user and has the token. The connection stays open; its end tells each
side that the other is gone."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from common.kv.errors import LinkLost, LinkRefused, LinkTimeout
from common.kv.offer import PROTOCOL_VERSION, CudaMemory, GrantOffer, Hello, Welcome, check_answer, judge
from common.kv.pool import KvPool, retire

_MAX_MESSAGE_BYTES = 64 << 10
_MAX_WRITERS = 256
_PEER_CREDENTIALS = struct.Struct("3i")


class MemoryDoor:
    """The owner's side: the socket that hands out one pool's memory (on a GPU: `cuda`). Never blocks; the caller polls
    `filenos`."""

    def __init__(self, pool: KvPool, cuda: CudaMemory | None = None) -> None:
        self.address = f"dejavu-kv-{secrets.token_hex(16)}"
        self._pool = pool
        self._cuda = cuda
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
        """GPU memory that a writer has open stays where it is for good: the writer may be copying into it."""
        self._listener.close()
        if self._cuda is not None and self._writers:
            retire(self._pool)
        for writer in self._writers.values():
            writer.close()

    def _accept(self) -> None:
        try:
            writer, _ = self._listener.accept()
        except OSError:
            return  # it gave up before it was let in
        _, uid = _peer(writer)
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
            is_welcome = isinstance(answer, Welcome)
            if isinstance(answer, Welcome):
                answer = msgspec.structs.replace(answer, cuda=self._cuda)
            fds = [self._pool.fd] if is_welcome and self._pool.fd is not None else []
            socket.send_fds(writer, [msgspec.msgpack.encode(answer)], fds)
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


def enter(offer: GrantOffer, pool: KvPool, link: str, timeout_s: float) -> Entrance:
    """The handshake; blocks. Raises `ConnectionRefusedError` where nobody listens (another network namespace),
    `LinkRefused`, `LinkTimeout` or `LinkLost`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{offer.memory_address}")
        hello = Hello(PROTOCOL_VERSION, offer.token, pool.name, pool.layout, link)
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


def owner_pid(connection: socket.socket) -> int:
    """The process that listens at the other end."""
    return _peer(connection)[0]


class Watch:
    """A writer's look at the connection after the handshake: the owner never says anything more, so all there can be to
    read is its end. `on_end` is called once, on the event loop that made this."""

    def __init__(self, connection: socket.socket, owner_name: str, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._owner_name = owner_name
        self._on_end = on_end
        self._is_open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._look)

    def check(self) -> None:
        """Raises `LinkLost` unless the owner is alive at this moment."""
        self._look()
        if not self._is_open:
            raise LinkLost(f"{self._owner_name} is gone, or the link to it was closed")

    def close(self) -> None:
        """Idempotent."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._connection)
            self._connection.close()
            self._on_end()

    def _look(self) -> None:
        if self._is_open and self._has_ended():
            self.close()

    def _has_ended(self) -> bool:
        try:
            self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True


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
