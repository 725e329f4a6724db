"""ZeroMQ between services: an `Inbox` (ROUTER, bound) receives, an `Outbox` (DEALER, connected) sends.

Each direction of a conversation has its own connection, so that either end may restart alone. On aiozmq's
protocol callbacks; frames are not copied on the way in or out. A successful send proves nothing: what matters is
acknowledged by the messages themselves.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

import aiozmq
import zmq

from common.keys import HANDSHAKE_MS, SERVICES, protect_server, protect_service

logger = logging.getLogger(__name__)

HIGH_WATER_MESSAGES = 4096
HEARTBEAT_INTERVAL_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
CONNECT_TIMEOUT_MS = 1000
"""Then it is tried anew: the system would wait ever longer between its own attempts, and find out late that a way which
was cut is mended."""
LINGER_MS = 200

OnMessage = Callable[[bytes, list[memoryview]], None]


class _ZeroCopySocket(zmq.Socket):  # type: ignore[type-arg]
    """Sends and receives without copying. A ROUTER drops what it cannot deliver and reports the peer.

    aiozmq closes a stream on any send error but EAGAIN, and would queue everybody's messages behind one slow
    peer on EAGAIN; so both are answered here.
    """

    on_undeliverable: Callable[[bytes], None] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # pyzmq forwards unknown attributes to socket options
        self.__dict__["on_undeliverable"] = None

    def send_multipart(self, msg_parts: Any, flags: int = 0, copy: bool = True, *args: Any, **kwargs: Any) -> Any:
        report = self.__dict__["on_undeliverable"]
        try:
            return super().send_multipart(msg_parts, flags, copy=False, **kwargs)
        except zmq.ZMQError as error:
            if report is None or error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            report(bytes(msg_parts[0]))
            return None

    def recv_multipart(self, flags: int = 0, copy: bool = True, track: bool = False) -> Any:
        return super().recv_multipart(flags, copy=False, track=track)


class _Protocol(aiozmq.ZmqProtocol):  # type: ignore[misc]
    def __init__(self, on_frames: Callable[[list[memoryview]], None]) -> None:
        self._on_frames = on_frames

    def msg_received(self, message: Sequence[Any]) -> None:
        # an error that left here would leave unread what else has arrived already, until more arrives
        try:
            self._on_frames([frame.buffer for frame in message])
        except Exception:
            logger.exception("a message could not be handled")


def _new_socket(kind: int, max_message_bytes: int) -> _ZeroCopySocket:
    socket = _ZeroCopySocket(zmq.Context.instance(), kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return socket


class Inbox:
    """A bound ROUTER socket; `endpoint` is its address. Messages arrive by callback on the event loop."""

    def __init__(self, transport: Any, endpoint: str) -> None:
        self._transport = transport
        self._is_paused = False
        self.endpoint = endpoint

    @classmethod
    async def bind(
        cls,
        address: str,
        on_message: OnMessage,
        on_undeliverable: Callable[[bytes], None] = lambda peer: None,
        max_message_bytes: int = 256 << 20,
        max_queued_messages: int = HIGH_WATER_MESSAGES,
        admits: str = SERVICES,
    ) -> Inbox:
        """Binds to `address` ("tcp://127.0.0.1:*" picks a port). `on_message(peer, frames)` gets each message,
        `on_undeliverable(peer)` each peer that is gone or has `max_queued_messages` unread. Raises `OSError` (port
        in use)."""

        def on_frames(frames: list[memoryview]) -> None:
            on_message(bytes(frames[0]), frames[1:])

        socket = _new_socket(zmq.ROUTER, max_message_bytes)
        socket.setsockopt(zmq.SNDHWM, max_queued_messages)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.__dict__["on_undeliverable"] = on_undeliverable
        protect_server(socket, address, admits)
        try:
            socket.bind(address)
            endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            transport, _ = await aiozmq.create_zmq_connection(lambda: _Protocol(on_frames), zmq.ROUTER, zmq_sock=socket)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise OSError(error.errno, f"{address}: {error.strerror}") from error
        return cls(transport, endpoint)

    def pause(self) -> None:
        """Leaves what arrives from now on where it is, until `resume`."""
        self._transport.pause_reading()
        self._is_paused = True

    def resume(self) -> None:
        """Idempotent."""
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def send(self, peer: bytes, *frames: bytes | memoryview) -> None:
        """Sends to a peer that has written to us; never waits. An unreachable peer is reported, not raised."""
        self._transport.write([peer, *frames])

    def close(self) -> None:
        self.resume()  # a paused transport would stay with the event loop
        self._transport.close()


class Outbox:
    """A DEALER socket connected to one peer's inbox; what is sent before the peer is up waits for it."""

    def __init__(self, transport: Any, endpoint: str) -> None:
        self._transport = transport
        self.endpoint = endpoint

    @classmethod
    async def connect(
        cls, endpoint: str, identity: str, on_frames: Callable[[list[memoryview]], None] = lambda frames: None
    ) -> Outbox:
        """Connects as `identity`; `on_frames` gets the peer's replies."""
        socket = _new_socket(zmq.DEALER, 256 << 20)
        socket.setsockopt_string(zmq.IDENTITY, identity)
        protect_service(socket, endpoint)
        socket.connect(endpoint)
        transport, _ = await aiozmq.create_zmq_connection(lambda: _Protocol(on_frames), zmq.DEALER, zmq_sock=socket)
        return cls(transport, endpoint)

    def send(self, *frames: bytes | memoryview) -> None:
        """Queues one message. A buffer that is sent must not change afterwards."""
        self._transport.write(list(frames))

    def close(self) -> None:
        self._transport.close()
