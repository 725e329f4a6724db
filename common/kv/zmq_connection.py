"""A writer's connection to the ZeroMQ door of a pool: the handshake, messages, and word of its end.

ZeroMQ itself would wait for a peer for ever. Here a connection that ends, or never begins, is an error at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.keys import protect_service
from common.kv.errors import LinkError, LinkLost, LinkTimeout
from common.kv.fence import Authority
from common.kv.offer import PROTOCOL_VERSION, GrantOffer, Hello, Welcome, check_answer
from common.kv.pool import Bytes, KvPool

_HEARTBEAT_MS = 1000
Frame = bytes | memoryview | Bytes


class ZmqConnection:
    """Uses ZeroMQ's asyncio sockets, without a thread of its own. `on_message` gets the frames of every message after
    the handshake; `on_end` is called once, when the connection is over."""

    def __init__(
        self,
        offer: GrantOffer,
        timeout_s: float,
        on_message: Callable[[Sequence[memoryview]], None] | None = None,
        on_end: Callable[[LinkError], None] | None = None,
    ) -> None:
        self._offer = offer
        self._timeout_s = timeout_s
        self._on_message = on_message
        self._on_end = on_end
        self.error: LinkError | None = None
        """Why it is over; None: it is not."""
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._socket = zmq.asyncio.Context.shadow(zmq.Context.instance()).socket(zmq.DEALER)
        self._configure()
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        self._monitor: zmq.asyncio.Socket = self._socket.get_monitor_socket(events)
        protect_service(self._socket, offer.zmq_endpoint)
        self._socket.connect(offer.zmq_endpoint)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def enter(self, pool: KvPool, link: str, authority: Authority) -> Welcome:
        """The handshake, for a link of this name. Raises `LinkRefused`, `LinkTimeout` or `LinkLost`; the connection
        is closed then."""
        try:
            hello = Hello(PROTOCOL_VERSION, self._offer.token, pool.name, pool.layout, link, dict(authority))
            async with asyncio.timeout(self._timeout_s):
                await self._socket.send(msgspec.msgpack.encode(hello))
                return check_answer(await self._answer, self._offer)
        except BaseException as error:
            await self.aclose()
            if isinstance(error, TimeoutError):
                raise LinkTimeout(f"{self._offer.name} did not answer within {self._timeout_s} s") from None
            raise

    async def send(self, frames: Sequence[Frame]) -> None:
        """Hands a message to ZeroMQ, which reads the frames' memory until it is sent. Raises the connection's
        error."""
        self.check()
        sending = asyncio.ensure_future(self._socket.send_multipart(frames, copy=False))
        # without a peer ZeroMQ would never take the message
        either: list[asyncio.Future[Any]] = [sending, self._end]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not sending.done():
                sending.cancel()
        self.check()

    def check(self) -> None:
        """Raises the connection's error if it is over."""
        if self.error is not None:
            raise type(self.error)(self.error.message)

    def fail(self, error: LinkError) -> None:
        """The connection is over, because of `error`."""
        if self.error is not None:
            return
        self.error = error
        self._end.set_result(None)
        if not self._answer.done():
            self._answer.set_exception(type(error)(error.message))
            self._answer.exception()  # seen, also where nobody waits for it any more
        if self._on_end is not None:
            self._on_end(error)

    async def aclose(self) -> None:
        """What ZeroMQ has not sent yet is dropped. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._socket.closed:
            self.fail(LinkLost(f"the link to {self._offer.name} was closed"))
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)

    async def _receive(self) -> None:
        while True:
            frames = [frame.buffer for frame in await self._socket.recv_multipart(copy=False)]
            if not self._answer.done():
                self._answer.set_result(frames[0])
            elif self._on_message is not None:
                self._on_message(frames)

    async def _watch(self) -> None:
        parse_monitor_message(await self._monitor.recv_multipart())
        self.fail(LinkLost(f"the connection to {self._offer.name} broke, or nobody listens there"))

    def _configure(self) -> None:
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 8)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, max(1, int(self._timeout_s * 1000)))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
