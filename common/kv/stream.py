"""Streaming KV out of a pool while it is being computed: the writer of a prompt stage."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.kv.arrival import Arrival
from common.kv.errors import LinkError, LinkLost
from common.kv.fence import Authority
from common.kv.lane import HandoffSpan, Job, Lane, LinkNumbers, Written
from common.kv.link import DEFAULT_TIMEOUT_S
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.staging import SideStream, mark_work

__all__ = ["Arrival", "HandoffSpan", "HandoffWriter"]

MAX_WAITING_JOBS = 4096
MAX_FORGOTTEN = 64
MIN_WRITE_BYTES = 4 << 20
"""Layers of a span wait for one another until they have so much, or the pool's last layer is there: every write costs
the computing thread a turn at the interpreter lock."""
Result = TypeVar("Result")


@dataclass(slots=True)
class _Progress:
    """Of one attempt at one sequence: jobs not over yet, the first error, and who waits for the end."""

    num_jobs: int = 0
    error: LinkError | None = None
    unconfirmed: dict[str, int] = field(default_factory=dict)
    drained: Future[LinkError | None] | None = None

    def note(self, error: LinkError | None) -> None:
        """A job is over."""
        if error is None:
            return
        for name, number in error.unconfirmed.items():
            self.unconfirmed[name] = max(number, self.unconfirmed.get(name, 0))
        if self.error is None or (error.may_still_write and not self.error.may_still_write):
            self.error = error

    def outcome(self) -> LinkError | None:
        """The first error, unless a later one is worse, with what is unconfirmed of all."""
        error = self.error
        if error is None or not self.unconfirmed:
            return error
        return type(error)(error.message, may_still_write=error.may_still_write, unconfirmed=self.unconfirmed)


@dataclass(frozen=True, slots=True)
class _Early:
    """Jobs for a pipeline that nobody has connected yet."""

    jobs: list[Job]
    deadline: asyncio.TimerHandle


class HandoffWriter:
    """Writes layers of sequences into the pools of pipelines, on one thread of its own with an event loop of
    its own.

    `submit` and `drain` may be called from any thread; the rest belongs to the event loop that called
    `start`, and `on_arrival` is called there.
    """

    def __init__(self, pool: KvPool, on_arrival: Callable[[Arrival], None], timeout_s: float) -> None:
        self._pool = pool
        self._device = pool.device
        self._on_arrival = on_arrival
        self._timeout_s = timeout_s
        self._home = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kv-copier", daemon=True)
        self._numbers = LinkNumbers(pool.name)
        self._lanes: dict[str, list[Lane]] = {}
        self._closed_lanes: set[asyncio.Task[None]] = set()
        self._early: dict[str, _Early] = {}
        self._forgotten: deque[str] = deque(maxlen=MAX_FORGOTTEN)
        self._progress: dict[tuple[str, int], _Progress] = {}
        self._held: dict[HandoffSpan, list[Job]] = {}
        self._lock = threading.Lock()
        self._room = threading.Semaphore(MAX_WAITING_JOBS)
        self._is_closed = False
        self._crash: BaseException | None = None
        self.sent_bytes = 0
        self._thread.start()

    @classmethod
    async def start(
        cls, pool: KvPool, on_arrival: Callable[[Arrival], None], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> HandoffWriter:
        """`timeout_s` is the deadline of every single write."""
        return cls(pool, on_arrival, timeout_s)

    async def attach(self, destination: str, offers: Sequence[GrantOffer], authority: Authority | None = None) -> None:
        """`connect`, but links are opened when they are needed: this waits for nobody."""
        await self._on_copier(self._attach(destination, list(offers), authority or {}))

    async def connect(self, destination: str, offers: Sequence[GrantOffer], authority: Authority | None = None) -> None:
        """Opens the way into a pipeline's pools, one offer per stage in order; ways to pools it had before
        and that are not offered again are closed, with what still waited for them (`[]`: forget the
        pipeline, and fail at once what comes for it later). `authority` is what owners may fence off.

        Raises the first `LinkError`; the way is tried again when it is needed.
        """
        await self._on_copier(self._connect(destination, list(offers), authority or {}))

    def links(self, destination: str) -> list[str | None]:
        """Name of the link to each of the pipeline's stages; None where there is none at present."""
        return [lane.link_name for lane in self._lanes.get(destination, [])]

    def submit(self, span: HandoffSpan, local_layer: int) -> None:
        """The span's KV in the pool's n-th layer exists (on a device: the current stream will have made it):
        send it, together with the next ones if it is small. A pipeline that is not connected yet is waited for. Blocks
        while too much waits. What fails is reported by `drain`."""
        layer = self._pool.layout.first_layer + local_layer
        job = Job(span, layer, mark_work(self._device))
        if not self._room.acquire(blocking=False):
            self._hand_over(lambda held: True)
            self._room.acquire()
        with self._lock:
            if self._crash is not None:
                raise RuntimeError("the copier thread has crashed") from self._crash
            self._progress.setdefault((span.sequence_id, span.attempt), _Progress()).num_jobs += 1
            held = self._held.setdefault(span, [])
            held.append(job)
            is_enough = layer + 1 == self._pool.layout.last_layer or len(held) >= self._layers_at_once(span)
        if is_enough:
            self._hand_over(lambda other: other is span)

    def _layers_at_once(self, span: HandoffSpan) -> int:
        start, end = span.token_range
        return -(-MIN_WRITE_BYTES // ((end - start) * self._pool.layout.bytes_per_token_layer))

    def _hand_over(self, is_meant: Callable[[HandoffSpan], bool]) -> None:
        """Gives the copier what is held of some spans."""
        with self._lock:
            jobs = [job for span in list(self._held) if is_meant(span) for job in self._held.pop(span)]
            if not self._is_closed:
                if jobs:
                    self._loop.call_soon_threadsafe(self._enter, jobs)
                return
        for job in jobs:
            self._fail(job)

    def drain(self, sequence_id: str, attempt: int) -> Future[LinkError | None]:
        """Done when everything submitted for this attempt is over: our blocks may then be overwritten. The
        result is the first error, None if all of it arrived. Where the error says `may_still_write` the
        destination's blocks are not safe before the owners have fenced off what is `unconfirmed`. Call it once,
        after the last `submit`."""
        future: Future[LinkError | None] = Future()
        key = (sequence_id, attempt)
        self._hand_over(lambda span: (span.sequence_id, span.attempt) == key)
        with self._lock:
            progress = self._progress.setdefault(key, _Progress())
            progress.drained = future
            if progress.num_jobs and self._crash is None:
                return future
            del self._progress[key]
        if progress.num_jobs:
            future.set_exception(self._crash)
        else:
            future.set_result(progress.outcome())
        return future

    async def reset(self, authority: Authority | None = None) -> None:
        """Drops what waits, and returns when nothing reads our pool any more. The ways are opened again when they are
        needed, under the epochs of before and these."""
        self._hand_over(lambda span: True)
        ways = {
            destination: ([lane.offer for lane in lanes], {**lanes[0].authority, **(authority or {})})
            for destination, lanes in self._lanes.items()
        }
        for destination in ways:
            await self.attach(destination, [])
        with self._lock:
            self._progress = {key: progress for key, progress in self._progress.items() if progress.num_jobs}
        for destination, (offers, epochs) in ways.items():
            await self.attach(destination, offers, epochs)

    async def aclose(self) -> None:
        """Closes all ways; what waited counts as failed, so every `drain` ends. Idempotent."""
        self._hand_over(lambda span: True)
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        await self._on_copier(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    # ------------------------------------------------------------ on the copier's thread

    def _run(self) -> None:
        # links wait for what the current stream was given: that must not be the compute's, which is far ahead
        with SideStream(self._pool.device).current() if not self._pool.is_host else contextlib.nullcontext():
            self._loop.run_forever()

    async def _on_copier(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _connect(self, destination: str, offers: list[GrantOffer], authority: Authority) -> None:
        lanes = await self._attach(destination, offers, authority)
        results = await asyncio.gather(*(lane.open() for lane in lanes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _attach(self, destination: str, offers: list[GrantOffer], authority: Authority) -> list[Lane]:
        """A lane to each offer, with its link if there was one; other lanes to this destination are closed."""
        before = {lane.offer: lane for lane in self._lanes.get(destination, []) if lane.authority == authority}
        kept = {offer: before[offer] for offer in offers if offer in before}
        others = [lane for lane in self._lanes.get(destination, []) if lane not in kept.values()]
        lanes = [kept.get(offer) or self._new_lane(index, offer, authority) for index, offer in enumerate(offers)]
        self._lanes[destination] = lanes
        if lanes:
            with contextlib.suppress(ValueError):
                self._forgotten.remove(destination)
        else:
            del self._lanes[destination]
            self._forgotten.append(destination)
        self._end_early(destination)
        await asyncio.gather(*(self._end(lane) for lane in others))
        return lanes

    async def _end(self, lane: Lane) -> None:
        await lane.aclose()
        letting_go = asyncio.create_task(lane.let_go())
        self._closed_lanes.add(letting_go)
        letting_go.add_done_callback(self._closed_lanes.discard)

    async def _close(self) -> None:
        known = {*self._lanes, *self._early}
        await asyncio.gather(*(self._attach(destination, [], {}) for destination in known))
        await asyncio.gather(*self._closed_lanes)
        # a handshake that was given up goes on in its thread, and has a deadline
        given_up = asyncio.all_tasks() - {asyncio.current_task()}
        if given_up:
            await asyncio.wait(given_up, timeout=self._timeout_s)

    def _enter(self, jobs: Sequence[Job]) -> None:
        """Jobs of any spans, in the order in which they came."""
        for destination, of_it in itertools.groupby(jobs, key=lambda job: job.span.destination):
            self._enter_for(destination, list(of_it))

    def _enter_for(self, destination: str, jobs: list[Job]) -> None:
        if destination in self._lanes:
            self._put(jobs)
        elif self._is_closed or (destination in self._forgotten and destination not in self._early):
            for job in jobs:
                self._fail(job)  # whoever waits for it to be connected waits in vain, and a step with him
        elif destination in self._early:
            self._early[destination].jobs.extend(jobs)
        else:
            deadline = self._loop.call_later(self._timeout_s, self._end_early, destination)
            self._early[destination] = _Early(jobs, deadline)

    def _put(self, jobs: Sequence[Job]) -> None:
        """Into the lanes of their one destination."""
        for job in jobs:
            for lane in self._lanes.get(job.span.destination, []):
                if lane.offer.layout.first_layer <= job.layer < lane.offer.layout.last_layer:
                    lane.put(job)
                    break
            else:
                self._fail(job)

    def _end_early(self, destination: str) -> None:
        """The pipeline has been connected, or is waited for no longer."""
        early = self._early.pop(destination, None)
        if early is not None:
            early.deadline.cancel()
            self._put(early.jobs)

    def _fail(self, job: Job) -> None:
        error = LinkLost(f"no way to layer {job.layer} of {job.span.destination}")
        self._written(Written(job.span, 1, 0, None, error))

    def _new_lane(self, index: int, offer: GrantOffer, authority: Authority) -> Lane:
        lane = Lane(self._pool, index, offer, authority, self._numbers, self._timeout_s, self._written)
        lane.task.add_done_callback(self._lane_ended)
        return lane

    def _lane_ended(self, task: asyncio.Task[None]) -> None:
        """Only a bug ends a lane with an exception: then nobody may wait for ever."""
        crash = None if task.cancelled() else task.exception()
        if crash is None:
            return
        with self._lock:
            self._crash = crash
            waiting = [progress.drained for progress in self._progress.values() if progress.drained is not None]
        self._room.release(MAX_WAITING_JOBS)
        for drained in waiting:
            drained.set_exception(crash)

    def _written(self, written: Written) -> None:
        key = (written.span.sequence_id, written.span.attempt)
        self._room.release(written.num_jobs)
        with self._lock:
            self.sent_bytes += written.num_bytes
            progress = self._progress[key]
            progress.num_jobs -= written.num_jobs
            progress.note(written.error)
            is_over = progress.num_jobs == 0 and progress.drained is not None
            if is_over:
                del self._progress[key]
        if written.arrival is not None:
            self._home.call_soon_threadsafe(self._on_arrival, written.arrival)
        if is_over and progress.drained is not None:
            progress.drained.set_result(progress.outcome())
