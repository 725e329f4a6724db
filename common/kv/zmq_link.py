"""The link that always works: pieces of KV in ZeroMQ messages, each acknowledged once it lies in the pool.

Writer: DEALER, owner: ROUTER. A message carries at most 4 MiB and a write keeps a few of them in flight. The
owner answers in order, so once every acknowledgement is there nothing of the writer can change the pool any
more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.keys import protect_service
from common.kv.copies import check_destination, gather
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.geometry import CopyPlan
from common.kv.offer import PROTOCOL_VERSION, GrantOffer, Hello, Refusal, check_answer
from common.kv.pool import Bytes, KvPool

MAX_MESSAGE_BYTES = 4 << 20
MAX_IN_FLIGHT = 4
"""Messages of one write that are not acknowledged yet."""
_MIN_DIRECT_BYTES = 64 << 10
"""Pieces from this size on are sent from where they are; smaller ones are gathered into one frame."""
_HEARTBEAT_MS = 1000


class Write(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    """Header of a message; the pieces' bytes follow, in one frame or in one frame each. `offsets` (in the
    owner's pool) and `num_bytes` are little-endian int64."""

    number: int
    offsets: bytes
    num_bytes: bytes


class Written(msgspec.Struct, frozen=True, array_like=True, tag="written"):
    number: int


class ZmqLink:
    """The writer's side; ZeroMQ's asyncio sockets, without a thread of its own."""

    name = "zmq"

    def __init__(self, offer: GrantOffer, timeout_s: float) -> None:
        self._offer = offer
        self._timeout_s = timeout_s
        loop = asyncio.get_running_loop()
        self._unwritten: dict[int, asyncio.Future[None]] = {}
        self._all_written = asyncio.Event()
        self._all_written.set()
        self._num_sent = 0
        self._broken: LinkError | None = None
        self._end: asyncio.Future[None] = loop.create_future()
        self._answer: asyncio.Future[bytes] = loop.create_future()
        self._socket = zmq.asyncio.Context.shadow(zmq.Context.instance()).socket(zmq.DEALER)
        _configure(self._socket, timeout_s)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        self._monitor: zmq.asyncio.Socket = self._socket.get_monitor_socket(events)
        protect_service(self._socket, offer.zmq_endpoint)
        self._socket.connect(offer.zmq_endpoint)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool, timeout_s: float) -> ZmqLink:
        """Raises `LinkRefused`, `LinkTimeout` or `LinkLost`."""
        link = cls(offer, timeout_s)
        try:
            hello = Hello(PROTOCOL_VERSION, offer.token, pool.name, pool.layout)
            async with asyncio.timeout(timeout_s):
                await link._socket.send(msgspec.msgpack.encode(hello))
                check_answer(await link._answer, offer)
        except BaseException as error:
            await link.aclose()
            if isinstance(error, TimeoutError):
                raise LinkTimeout(f"{offer.name} did not answer within {timeout_s} s") from None
            raise
        return link

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`."""
        check_destination(plan.destination_offset, plan.num_bytes, self._offer.layout.total_bytes)
        acknowledged: list[asyncio.Future[None]] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                for part in split(plan, MAX_MESSAGE_BYTES):
                    if len(acknowledged) >= MAX_IN_FLIGHT:
                        await acknowledged[-MAX_IN_FLIGHT]
                    acknowledged.append(await self._send(source.memory, part))
                await asyncio.gather(*acknowledged)
        except TimeoutError:
            message = f"{self._offer.name} did not confirm a write within {self._timeout_s} s"
            self._break(LinkTimeout(message, may_still_write=True))
            raise LinkTimeout(message, may_still_write=bool(self._unwritten)) from None

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        try:
            if not self._socket.closed:
                await self._confirm()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if not self._socket.closed:
                self._break(LinkLost(f"the link to {self._offer.name} was closed"))
                self._socket.disable_monitor()
                self._monitor.close(linger=0)
                self._socket.close(linger=0)

    async def _confirm(self) -> None:
        """Waits for what is still on its way."""
        try:
            async with asyncio.timeout(0 if isinstance(self._broken, LinkLost) else self._timeout_s):
                await self._all_written.wait()
        except TimeoutError:
            message = f"{self._offer.name} may still carry out {len(self._unwritten)} writes"
            raise LinkTimeout(message, may_still_write=True) from None

    async def _send(self, memory: Bytes, part: CopyPlan) -> asyncio.Future[None]:
        self._check()
        self._num_sent += 1
        header = Write(self._num_sent, part.destination_offset.tobytes(), part.num_bytes.tobytes())
        written = self._unwritten[self._num_sent] = asyncio.get_running_loop().create_future()
        self._all_written.clear()
        frames = [msgspec.msgpack.encode(header), *_payload(memory, part)]
        sending = asyncio.ensure_future(self._socket.send_multipart(frames, copy=False))
        # without a peer ZeroMQ would never take the message
        either: list[asyncio.Future[Any]] = [sending, self._end]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            sending.cancel()
            self._check()
        return written

    def _check(self) -> None:
        if self._broken is not None:
            raise LinkLost(self._broken.message, may_still_write=bool(self._unwritten))

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            if not self._answer.done():
                self._answer.set_result(frame)
                continue
            try:
                message = msgspec.msgpack.decode(frame, type=Written | Refusal)
            except msgspec.DecodeError as error:
                self._break(LinkLost(f"{self._offer.name} sent what is no answer: {error}"))
                continue
            if isinstance(message, Refusal):
                self._break(LinkRefused(message.reason))
            else:
                self._written(message.number)

    def _written(self, number: int) -> None:
        written = self._unwritten.pop(number, None)
        if written is not None and not written.done():
            written.set_result(None)
        if not self._unwritten:
            self._all_written.set()

    async def _watch(self) -> None:
        """ZeroMQ would wait for a peer for ever; here a connection that ends, or never begins, is an error
        at once."""
        parse_monitor_message(await self._monitor.recv_multipart())
        self._break(LinkLost(f"the connection to {self._offer.name} broke, or nobody listens there"))

    def _break(self, error: LinkError) -> None:
        self._broken = self._broken or error
        if not self._end.done():
            self._end.set_result(None)
        futures: list[asyncio.Future[Any]] = [self._answer, *self._unwritten.values()]
        for waiting in futures:
            if not waiting.done():
                waiting.set_exception(type(error)(error.message, may_still_write=bool(self._unwritten)))
                waiting.exception()  # seen, also where nobody waits for it any more


def split(plan: CopyPlan, max_bytes: int) -> Iterator[CopyPlan]:
    """The plan in parts of at most `max_bytes`; pieces that are bigger are cut."""
    num_cuts = -(-plan.num_bytes // max_bytes)
    within = (np.arange(num_cuts.sum()) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)) * max_bytes
    source = np.repeat(plan.source_offset, num_cuts) + within
    destination = np.repeat(plan.destination_offset, num_cuts) + within
    sizes = np.minimum(np.repeat(plan.num_bytes, num_cuts) - within, max_bytes)
    ends = np.cumsum(sizes)
    first, sent = 0, 0
    while first < len(sizes):
        end = int(np.searchsorted(ends, sent + max_bytes, side="right"))
        yield CopyPlan(source[first:end], destination[first:end], sizes[first:end])
        first, sent = end, int(ends[end - 1])


def _payload(memory: Bytes, part: CopyPlan) -> list[Bytes]:
    if part.total_bytes < _MIN_DIRECT_BYTES * len(part):
        return [gather(part, memory)]
    pieces = zip(part.source_offset.tolist(), part.num_bytes.tolist(), strict=True)
    return [memory[start : start + num_bytes] for start, num_bytes in pieces]


def _configure(socket: zmq.asyncio.Socket, timeout_s: float) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 2 * MAX_IN_FLIGHT)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, max(1, int(timeout_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
