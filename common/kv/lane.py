"""The way to one destination stage: its link, and what waits to be written over it, in order."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.kv.arrival import Arrival, pool_checksum
from common.kv.checksum import SpanBinding
from common.kv.errors import LinkError, LinkLost, LinkRefused
from common.kv.fence import Authority
from common.kv.geometry import Range, plan_copies
from common.kv.link import Link, open_link
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.staging import HostStaging

_MAX_WRITE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class HandoffSpan:
    """Tokens of a sequence that go from our blocks to those of a pipeline (`destination`). Both block tables
    start at the sequence's token 0; `token_hash` is the hash of its token ids up to the range's end."""

    sequence_id: str
    attempt: int
    destination: str
    token_range: Range
    source_blocks: Sequence[int]
    destination_blocks: Sequence[int]
    token_hash: bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One layer of a span; on a device its KV exists once `ready` has happened."""

    span: HandoffSpan
    layer: int
    ready: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Written:
    """Jobs that are over: `arrival` if their bytes are there, else `error`."""

    span: HandoffSpan
    num_jobs: int
    num_bytes: int
    arrival: Arrival | None
    error: LinkError | None


class LinkNumbers:
    """Links of one process into other pools are numbered, so that an owner can be told up to which one to refuse."""

    def __init__(self, pool_name: str) -> None:
        self._writer = f"{pool_name}.{secrets.token_hex(4)}"
        self._number = 0

    def next(self, owner: str) -> Authority:
        """For another link into the owner's pool."""
        self._number += 1
        return {f"{self._writer}>{owner}": self._number}


class Lane:
    """Lives on the copier's event loop. Writes one thing at a time, everything that waits for the same span
    together; `on_written` hears of every job exactly once. Links are closed behind: nobody waits for a peer that does
    not answer."""

    def __init__(
        self,
        pool: KvPool,
        stage_index: int,
        offer: GrantOffer,
        authority: Authority,
        numbers: LinkNumbers,
        timeout_s: float,
        on_written: Callable[[Written], None],
    ) -> None:
        self.offer = offer
        self.authority = authority
        self._numbers = numbers
        self._number: Authority = {}
        """of the last link"""
        self._pool = pool
        self._stage_index = stage_index
        self._timeout_s = timeout_s
        self._on_written = on_written
        self._link: Link | None = None
        self._opening = asyncio.Lock()
        self._staging = None if pool.is_host else HostStaging(pool)
        self._waiting: list[Job] = []
        self._wake = asyncio.Event()
        self._failure: LinkError | None = None
        self._retry_at_s = 0.0
        self._closed: LinkError | None = None
        self._writing: asyncio.Task[Arrival] | None = None
        self._closings: set[asyncio.Task[None]] = set()
        self.task = asyncio.create_task(self._run())

    @property
    def link_name(self) -> str | None:
        return None if self._link is None or self._link.is_over else self._link.name

    async def open(self) -> None:
        """Opens the link ahead of the first write. Raises `LinkError`."""
        theirs, ours = self.offer.layout.heads, self._pool.layout.heads
        if not ours[0] <= theirs[0] < theirs[1] <= ours[1]:
            raise LinkRefused(f"{self._pool.name} has the KV heads {ours}, {self.offer.name} wants {theirs}")
        async with self._opening:
            if self._link is None and self._closed is None:
                self._number = self._numbers.next(self.offer.name)
                authority = {**self.authority, **self._number}
                link = await open_link(self.offer, self._pool, authority=authority, timeout_s=self._timeout_s)
                if self._closed is None:
                    self._link = link
                else:
                    self._close_behind(link)

    def put(self, job: Job) -> None:
        if self._closed is not None:
            self._on_written(Written(job.span, 1, 0, None, self._closed))
            return
        self._waiting.append(job)
        self._wake.set()

    async def aclose(self) -> None:
        """What waits, or is being written, is given up. When it returns nothing reads our pool for it any more."""
        self._closed = self._closing()
        if self._writing is not None:
            self._writing.cancel()
        self._wake.set()
        await self.task

    async def let_go(self) -> None:
        """Returns when its links are closed, as far as that can be."""
        while self._closings:
            await asyncio.wait(self._closings)

    def _closing(self) -> LinkLost:
        return LinkLost(f"the way to {self.offer.name} was closed")

    async def _run(self) -> None:
        while self._closed is None:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            for jobs in together(waiting, self._pool):
                await self._settle(jobs)
        for jobs in together(self._waiting, self._pool):
            await self._settle(jobs)
        self._drop_link()

    async def _settle(self, jobs: Sequence[Job]) -> None:
        span = jobs[0].span
        arrival, error = None, self._closed or self._recent_failure()
        if error is None:
            try:
                arrival = await self._until_closed(self._write(span, (jobs[0].layer, jobs[-1].layer + 1), jobs))
            except LinkError as failure:
                error = self._failed(failure)
            except ValueError as failure:
                # blocks that the other side named do not exist
                error = LinkRefused(str(failure))
        num_bytes = 0 if arrival is None else self._num_bytes(arrival)
        self._on_written(Written(span, len(jobs), num_bytes, arrival, error))

    async def _until_closed(self, write: Coroutine[Any, Any, Arrival]) -> Arrival:
        """Raises `LinkLost` if we are closed meanwhile: what is under way may still have an effect."""
        self._writing = asyncio.create_task(write)
        try:
            return await self._writing
        except asyncio.CancelledError:
            if self._closed is None or not self._writing.cancelled():
                raise
            is_over = self._link is None or self._link.name in ("shm", "cuda_ipc")
            raise LinkLost(self._closed.message, may_still_write=not is_over) from None
        finally:
            self._writing = None

    async def _write(self, span: HandoffSpan, layers: Range, jobs: Sequence[Job]) -> Arrival:
        if self._link is not None and self._link.is_over:
            self._drop_link()  # nothing was under way, so that nobody has to hear of it
        if self._link is None:
            await self.open()
        link = self._link
        if link is None:
            raise self._closing()
        source, blocks = self._pool, span.source_blocks
        ready = [job.ready for job in jobs if job.ready is not None]
        if link.name == "cuda_ipc":
            for event in ready:
                event.synchronize()
        elif self._staging is not None:  # the other links take host memory
            source, blocks = self._staging.copy_out(blocks, span.token_range, layers, ready)
        theirs = self.offer.layout
        plan = plan_copies(
            source.layout, blocks, theirs, span.destination_blocks, span.token_range, layers, theirs.heads
        )
        await link.write(source, plan)
        binding = SpanBinding(theirs.fingerprint, span.sequence_id, layers, span.token_range, span.token_hash)
        start, end = span.token_range
        return Arrival(
            span.destination, self._stage_index, span.sequence_id, span.attempt, layers, start, end - start,
            span.destination_blocks, span.token_hash,
            pool_checksum(source, blocks, binding, theirs.heads),
        )  # fmt: skip

    def _num_bytes(self, arrival: Arrival) -> int:
        num_layers = arrival.layers[1] - arrival.layers[0]
        return arrival.num_tokens * num_layers * self.offer.layout.bytes_per_token_layer

    def _recent_failure(self) -> LinkError | None:
        """A peer that just failed is not asked again for each job: a frozen one would cost a deadline every
        time."""
        if self._failure is None or asyncio.get_running_loop().time() >= self._retry_at_s:
            return None
        return type(self._failure)(self._failure.message)

    def _failed(self, failure: LinkError) -> LinkError:
        """Drops the link; the error says what to fence off where something that was sent may still have an effect."""
        unconfirmed = {}
        if failure.may_still_write:
            unconfirmed = {name: number + 1 for name, number in self._number.items()}
        self._drop_link()
        self._failure = type(failure)(failure.message, may_still_write=failure.may_still_write, unconfirmed=unconfirmed)
        self._retry_at_s = asyncio.get_running_loop().time() + self._timeout_s
        return self._failure

    def _drop_link(self) -> None:
        if self._link is not None:
            self._close_behind(self._link)
        self._link = None

    def _close_behind(self, link: Link) -> None:
        closing = asyncio.create_task(_close(link))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)


async def _close(link: Link) -> None:
    with contextlib.suppress(LinkError):  # the jobs that it concerns have been told
        await link.aclose()


def together(jobs: Iterable[Job], pool: KvPool) -> Iterator[list[Job]]:
    """Jobs that can be one write: neighbouring layers of one span, as long as they are not too many bytes."""
    by_span: dict[HandoffSpan, list[Job]] = {}
    for job in jobs:
        by_span.setdefault(job.span, []).append(job)
    for span, of_span in by_span.items():
        start, end = span.token_range
        max_layers = max(1, _MAX_WRITE_BYTES // ((end - start) * pool.layout.bytes_per_token_layer))
        of_span.sort(key=lambda job: job.layer)
        group: list[Job] = []
        for job in of_span:
            if group and (job.layer != group[-1].layer + 1 or len(group) == max_layers):
                yield group
                group = []
            group.append(job)
        yield group
