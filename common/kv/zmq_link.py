"""The link that always works: pieces of KV in ZeroMQ messages, each answered by the owner once it is carried out.

A message carries at most 4 MiB of KV and a link keeps a few of them in flight. The owner answers in order, so once
every answer is there nothing of this link can change the pool any more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from common.kv.copies import check_plan, split
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.fence import Authority
from common.kv.geometry import CopyPlan, Int64
from common.kv.offer import GrantOffer, Leave, Refusal
from common.kv.pool import Bytes, KvPool
from common.kv.zmq_connection import ZmqConnection
from common.kv.zmq_messages import (
    MAX_IN_FLIGHT,
    MAX_MESSAGE_BYTES,
    Done,
    Read,
    Write,
    from_frames,
    into,
    to_frames,
)

_MESSAGE: msgspec.msgpack.Decoder[Done | Refusal] = msgspec.msgpack.Decoder(Done | Refusal)
Answer = asyncio.Future[Sequence[memoryview]]


@dataclass(frozen=True, slots=True)
class _Request:
    """A message that is not answered yet. Whoever waited for `answer` may have given up."""

    answer: Answer
    is_write: bool


class ZmqLink:
    """The writer's side."""

    name = "zmq"

    def __init__(self, offer: GrantOffer, timeout_s: float) -> None:
        self._offer = offer
        self._timeout_s = timeout_s
        self._requests: dict[int, _Request] = {}
        self._num_sent = 0
        self._answered = asyncio.Event()
        self._failure: LinkError | None = None
        self._connection = ZmqConnection(offer, timeout_s, self._on_message, self._fail)

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool, timeout_s: float, authority: Authority) -> ZmqLink:
        """Raises `LinkRefused`, `LinkTimeout` or `LinkLost`."""
        link = cls(offer, timeout_s)
        await link._connection.enter(pool, cls.name, authority)
        return link

    @property
    def is_over(self) -> bool:
        """See `Link.is_over`."""
        return self._failure is not None

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`."""
        check_plan(plan, source.layout.total_bytes, self._offer.layout.total_bytes)
        answers: list[Answer] = []
        async with self._deadline("write"):
            for part in split(plan, MAX_MESSAGE_BYTES):
                await self._room()
                frames = to_frames(source.memory, part.source_offset, part.num_bytes)
                answers.append(await self._send(Write, part.destination_offset, part.num_bytes, frames))
            await asyncio.gather(*answers)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`."""
        check_plan(plan, self._offer.layout.total_bytes, destination.layout.total_bytes)
        asked: deque[tuple[Answer, CopyPlan]] = deque()
        async with self._deadline("read"):
            for part in split(plan, MAX_MESSAGE_BYTES):
                if len(asked) >= MAX_IN_FLIGHT:
                    await self._take(*asked.popleft(), destination.memory)
                await self._room()
                asked.append((await self._send(Read, part.source_offset, part.num_bytes, []), part))
            while asked:
                await self._take(*asked.popleft(), destination.memory)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._until(lambda: not self._num_unwritten or self._connection.error is not None)
                if self._connection.error is None:
                    await self._connection.send([msgspec.msgpack.encode(Leave())])
        except (TimeoutError, LinkLost):
            pass
        finally:
            num_unwritten = self._num_unwritten
            await self._connection.aclose()
        if num_unwritten:
            message = f"{self._offer.name} may still carry out {num_unwritten} writes"
            raise LinkTimeout(message, may_still_write=True)

    @property
    def _num_unwritten(self) -> int:
        return sum(request.is_write for request in self._requests.values())

    async def _room(self) -> None:
        await self._until(lambda: len(self._requests) < MAX_IN_FLIGHT or self._failure is not None)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._answered.clear()
            await self._answered.wait()

    async def _send(
        self, kind: type[Write | Read], offsets: Int64, num_bytes: Int64, payload: Sequence[Bytes]
    ) -> Answer:
        if self._failure is not None:
            raise LinkLost(self._failure.message)
        self._num_sent += 1
        answer: Answer = asyncio.get_running_loop().create_future()
        self._requests[self._num_sent] = _Request(answer, kind is Write)
        header = kind(self._num_sent, offsets.tobytes(), num_bytes.tobytes())
        await self._connection.send([msgspec.msgpack.encode(header), *payload])
        return answer

    async def _take(self, answer: Answer, part: CopyPlan, memory: Bytes) -> None:
        try:
            from_frames(await answer, part.destination_offset, part.num_bytes, into(memory))
        except ValueError as error:
            raise LinkLost(f"{self._offer.name} sent what is no answer: {error}") from error

    def _on_message(self, frames: Sequence[memoryview]) -> None:
        try:
            message = _MESSAGE.decode(frames[0])
        except msgspec.DecodeError as error:
            self._fail(LinkLost(f"{self._offer.name} sent what is no answer: {error}"))
            return
        if isinstance(message, Refusal):
            self._fail(LinkRefused(message.reason))
            return
        request = self._requests.pop(message.number, None)
        self._answered.set()
        if request is not None and not request.answer.done():
            request.answer.set_result(frames[1:])

    def _fail(self, error: LinkError) -> None:
        """Nothing more is sent; everybody who waits hears of it."""
        self._failure = self._failure or error
        self._answered.set()
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(type(error)(error.message))
                request.answer.exception()  # seen, also where nobody waits for it any more

    @asynccontextmanager
    async def _deadline(self, what: str) -> AsyncIterator[None]:
        """Every error says whether something of this link may still change the owner's pool."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            late = LinkTimeout(f"{self._offer.name} did not confirm a {what} within {self._timeout_s} s")
            self._fail(late)
            raise self._as_of_now(late) from None
        except LinkError as error:
            raise self._as_of_now(error) from None

    def _as_of_now(self, error: LinkError) -> LinkError:
        return type(error)(error.message, may_still_write=self._num_unwritten > 0)
