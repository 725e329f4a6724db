"""The link across hosts: one-sided copies by NVIDIA's transfer library, over the fastest way that both sides have.

The handshake goes through the owner's ZeroMQ door, and that connection stays open: its end says that the owner is gone.
A thread starts the copies and watches them, for the library has nothing to wait on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import torch

from common.kv.copies import check_plan, gather, packed, scatter, split
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.fence import Authority
from common.kv.gate import Gate, GivenUp
from common.kv.geometry import CopyPlan
from common.kv.nixl_agent import Region, Transfer, initiator
from common.kv.offer import GrantOffer, Leave, NixlMemory, Refusal
from common.kv.pool import KvPool
from common.kv.zmq_connection import ZmqConnection
from common.kv.zmq_messages import Done

MAX_TRANSFER_BYTES = 16 << 20
"""A link has one transfer of at most this size under way."""
_MAX_AT_ONCE_BYTES = 4 << 20
"""Up to here the calling thread does it, if it can: the event loop waits no longer than for a copy in host memory."""
_MAX_BLIND_S = 1e-3
"""For no longer than this writes that are over at once keep the event loop from seeing the owner's end."""
_SPIN_S = 200e-6
_MIN_SLEEP_S, _MAX_SLEEP_S = 20e-6, 1e-3
_ANSWER: msgspec.msgpack.Decoder[Done | Refusal] = msgspec.msgpack.Decoder(Done | Refusal)
Result = TypeVar("Result")


class NixlLink:
    """The writer's side. All the library does for it happens on one thread, in `_Mover`."""

    name = "nixl"

    def __init__(self, offer: GrantOffer, timeout_s: float) -> None:
        self._offer = offer
        self._timeout_s = timeout_s
        self._their_bytes = offer.layout.total_bytes
        self._connection = ZmqConnection(offer, timeout_s, self._told, self._ended)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-nixl")
        self._failure: LinkError | None = None
        self._gates: set[Gate] = set()
        self._works: set[Future[Any]] = set()
        self._mover: _Mover | None = None
        self._looked_at_s = 0.0
        self._heard = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool, timeout_s: float, authority: Authority) -> NixlLink:
        """The first link of a process takes about a second more than the handshake. Raises `LinkRefused`,
        `LinkTimeout` or `LinkLost`."""
        link = cls(offer, timeout_s)
        try:
            welcome = await link._connection.enter(pool, cls.name, authority)
            memory = welcome.nixl
            if memory is None:
                raise LinkRefused(f"{pool.name} wants the transfer library, {offer.name} does not have it")
            link._mover = await link._on_thread(lambda: _Mover(pool, memory))
        except BaseException:
            await link._connection.aclose()
            link._executor.shutdown(wait=False)
            raise
        return link

    @property
    def is_over(self) -> bool:
        """See `Link.is_over`."""
        return self._failure is not None

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`."""
        check_plan(plan, source.total_bytes, self._their_bytes)
        await self._move(source, plan, is_write=True)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`."""
        check_plan(plan, self._their_bytes, destination.total_bytes)
        await self._move(destination, plan, is_write=False)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        mover, self._mover = self._mover, None
        if mover is None:
            return
        self._fail(LinkLost(f"the link to {self._offer.name} was closed"))
        try:
            await self._leave(mover)
        finally:
            may_still_write = await self._on_thread(mover.let_go)
            await self._connection.aclose()
            self._executor.shutdown(wait=False)
        if may_still_write:
            raise LinkTimeout(f"a write to {self._offer.name} has not ended", may_still_write=True)

    def _told(self, frames: Sequence[memoryview]) -> None:
        """All that an owner says after the handshake: that it has heard of our end, or that it wants it."""
        answer = _ANSWER.decode(frames[0])
        if isinstance(answer, Done):
            self._heard.set()
        elif self._mover is not None:
            self._fail(LinkLost(answer.reason))
            self._leave(self._mover)

    def _ended(self, error: LinkError) -> None:
        self._fail(error)
        self._heard.set()

    def _leave(self, mover: _Mover) -> asyncio.Task[None]:
        if self._leaving is None or (self._leaving.done() and not self._heard.is_set()):
            self._leaving = asyncio.create_task(self._say_goodbye(mover))
        return self._leaving

    async def _say_goodbye(self, mover: _Mover) -> None:
        """Once nothing is under way the owner hears so: else it would take us for a writer for as long as it lives."""
        gate = Gate()
        try:
            async with asyncio.timeout(self._timeout_s):
                with contextlib.suppress(LinkLost):  # a transfer that failed is over, too
                    await self._on_thread(lambda: mover.settle(gate))
                await self._connection.send([msgspec.msgpack.encode(Leave())])
                await self._heard.wait()
        except (TimeoutError, LinkError):
            pass  # `let_go` tells what is still under way
        finally:
            gate.shut()

    async def _move(self, pool: KvPool, plan: CopyPlan, *, is_write: bool) -> None:
        mover, gate = self._mover, Gate()
        if mover is None or self._failure is not None:
            raise self._lost(mover)
        move = _Move(mover, pool, plan, gate, is_write)
        self._gates.add(gate)
        try:
            if plan.total_bytes > _MAX_AT_ONCE_BYTES or self._works or not mover.is_idle:
                await self._within_deadline(move.run)
            elif move.try_at_once():
                await self._look_around()
            else:
                await self._within_deadline(move.end)
        except TimeoutError:
            message = f"{self._offer.name} did not let a transfer end within {self._timeout_s} s"
            self._fail(LinkTimeout(message))
            raise LinkTimeout(message, may_still_write=mover.may_still_write) from None
        except (LinkError, GivenUp) as error:
            self._fail(LinkLost(f"the way to {self._offer.name} broke: {error}"))
            raise self._lost(mover) from None
        finally:
            gate.shut()
            self._gates.discard(gate)
        if self._failure is not None:
            raise self._lost(mover)

    async def _within_deadline(self, work: Callable[[], None]) -> None:
        async with asyncio.timeout(self._timeout_s):
            await self._on_thread(work)

    async def _look_around(self) -> None:
        """Lets the event loop see the owner's end, if it has not had the chance for a while."""
        if time.perf_counter() > self._looked_at_s + _MAX_BLIND_S:
            await asyncio.sleep(0)
            self._looked_at_s = time.perf_counter()

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        # what runs on the thread ends by itself, soon after its gate is shut
        future = self._executor.submit(work)
        self._works.add(future)
        future.add_done_callback(self._works.discard)
        return await asyncio.shield(asyncio.wrap_future(future))

    def _lost(self, mover: _Mover | None) -> LinkLost:
        message = f"the link to {self._offer.name} was closed" if self._failure is None else self._failure.message
        return LinkLost(message, may_still_write=mover is not None and mover.may_still_write)

    def _fail(self, error: LinkError) -> None:
        """Nothing more is begun, and whoever waits hears of it."""
        self._failure = self._failure or error
        for gate in list(self._gates):
            gate.shut()


@dataclass(slots=True)
class _Move:
    """One `write` or `read`. What it raises is what `_Mover` raises."""

    mover: _Mover
    pool: KvPool
    plan: CopyPlan
    gate: Gate
    is_write: bool

    def run(self) -> None:
        """All of it; on the link's thread."""
        self.mover.settle(self.gate)
        for part in split(self.plan, MAX_TRANSFER_BYTES):
            self._begin(part)
            self.mover.settle(self.gate)
            self._end(part)

    def try_at_once(self) -> bool:
        """Small ones, where nothing else is under way, are begun and mostly ended by the calling thread: another one
        costs more than the copy. False: `end` has to follow, on the link's thread."""
        self._begin(self.plan)
        if not self.mover.is_over_soon():
            return False
        self._end(self.plan)
        return True

    def end(self) -> None:
        """After a `try_at_once` that took too long."""
        self.mover.settle(self.gate)
        self._end(self.plan)

    def _begin(self, part: CopyPlan) -> None:
        if self.is_write:
            self.mover.begin_write(self.pool, part, self.gate)
        else:
            self.mover.begin_read(part, self.gate)

    def _end(self, part: CopyPlan) -> None:
        if not self.is_write:
            self.mover.end_read(self.pool, part, self.gate)


class _Mover:
    """What the library does for a link, on the link's thread or, while that has nothing to do, on the caller's; it
    blocks. Writes go straight from our pool. What is read lands in memory of the link first: bytes that come late
    cannot reach our pool then.

    Any method may raise `GivenUp` once its gate is shut, and `LinkLost` where a transfer fails.
    """

    def __init__(self, pool: KvPool, theirs: NixlMemory) -> None:
        self._agent = initiator()
        self._theirs = theirs
        self._peer = self._agent.add_peer(theirs.metadata)
        self._landing = self._agent.register(torch.empty(MAX_TRANSFER_BYTES, dtype=torch.uint8))
        # what leaves a GPU's pool comes by way of the host; not every build of the library takes that memory
        self._own = self._agent.register(pool.arena if pool.is_host else self._landing.memory)
        self._under_way: Transfer | None = None
        self.may_still_write = False
        """A write is about to begin or has begun, and has not ended. On one host the library copies before it says that
        it has begun."""

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return self._under_way is None

    def begin_write(self, source: KvPool, part: CopyPlan, gate: Gate) -> None:
        region = self._own
        if source.address != region.address:  # not registered, and not worth it
            with gate:
                pieces = gather(source.memory, part.source_offset, part.num_bytes)
                self._landing.memory.numpy()[: len(pieces)] = pieces
            region, part = self._landing, CopyPlan(packed(part.num_bytes), part.destination_offset, part.num_bytes)
        self._begin(region, part, gate, is_write=True)

    def begin_read(self, part: CopyPlan, gate: Gate) -> None:
        landing = CopyPlan(part.source_offset, packed(part.num_bytes), part.num_bytes)
        self._begin(self._landing, landing, gate, is_write=False)

    def end_read(self, destination: KvPool, part: CopyPlan, gate: Gate) -> None:
        with gate:
            payload = self._landing.memory.numpy()[: part.total_bytes]
            scatter(payload, part.destination_offset, part.num_bytes, destination.memory)

    def _begin(self, region: Region, part: CopyPlan, gate: Gate, *, is_write: bool) -> None:
        self.may_still_write = is_write  # before the look at the gate: whoever shuts it looks at this afterwards
        try:
            if gate.is_shut:
                raise GivenUp
            self._under_way = self._agent.start(self._peer, region, self._theirs, part, is_write=is_write)
        except (LinkLost, GivenUp):
            self._over()
            raise

    def _over(self) -> None:
        self._under_way, self.may_still_write = None, False

    def is_over_soon(self) -> bool:
        """Whether nothing is under way any more after a moment that is shorter than a change of threads takes."""
        until_s = time.perf_counter() + _SPIN_S
        while self._under_way is not None:
            if self._is_over(self._under_way):
                self._over()
            elif time.perf_counter() > until_s:
                return False
        return True

    def settle(self, gate: Gate) -> None:
        """Waits until nothing is under way."""
        started_s, sleep_s = time.perf_counter(), _MIN_SLEEP_S
        while self._under_way is not None:
            if self._is_over(self._under_way):
                self._over()
            elif gate.is_shut:
                raise GivenUp
            elif time.perf_counter() > started_s + _SPIN_S:
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)

    def _is_over(self, transfer: Transfer) -> bool:
        try:
            return self._agent.is_over(transfer)
        except LinkLost:
            self._over()
            raise

    def let_go(self) -> bool:
        """The end of the link; whether a write may still have an effect."""
        may_still_write = self.may_still_write
        if self._under_way is not None:
            self._agent.leave(self._under_way)
        self._agent.unregister(self._landing)
        self._agent.unregister(self._own)
        self._agent.remove_peer(self._peer)
        return may_still_write
