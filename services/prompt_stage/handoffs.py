"""Streams the KV of prompts to token stages, layer by layer, behind the compute.

The compute thread says which layer of which step exists (`layer_done`); the event loop writes it over a link to the
stage that owns the layer, and tells that stage when all its layers of a chunk are there (`KvArrived`, with checksum).
`close` is called before the source blocks can be overwritten: it waits for what is still under way and then tells the
token driver that nothing more will be written (`HandoffEnded`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from common.kv.checksum import SpanBinding, hash_tokens, span_checksum
from common.kv.geometry import plan_copies, route
from common.kv.link import GrantOffer, Link, LinkError, open_link
from common.kv.pool import KvPool
from common.membership import PipelineRecord
from common.messages import Handoff, HandoffEnded, KvArrived, Message, Step, pack_ids
from common.stage.worker import StageSequence
from dejavu.errors import ProtocolError

logger = logging.getLogger(__name__)

LINK_WAIT_S = 5.0
MAX_PENDING_WRITES = 512
"""Layers of chunks under way; the compute thread waits beyond it."""

Send = Callable[[str, Message], bool]


@dataclass(frozen=True, slots=True)
class Target:
    """One stage of a token pipeline at an epoch, and the layers of ours that it owns."""

    name: str
    epoch: int
    layers: tuple[int, int]
    offer: GrantOffer
    link: Link


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Tokens [start, end) of a sequence, with everything a write needs."""

    sequence_id: str
    attempt: int
    start: int
    end: int
    source_blocks: list[int]
    handoff: Handoff
    token_hash: bytes


@dataclass(slots=True)
class Transfer:
    """What is under way for one sequence."""

    num_pending: int = 0
    error: str | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Handoffs:
    """All hand-offs of one prompt stage."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pool: KvPool, stage_index: int, num_stages: int, send: Send, kind: str
    ) -> None:
        self.sent_bytes = 0
        self._loop = loop
        self._pool = pool
        self._stage_index = stage_index
        self._num_stages = num_stages
        self._send = send
        self._kind = kind
        self._targets: dict[str, list[Target]] = {}
        self._drivers: dict[str, tuple[str, int]] = {}
        self._transfers: dict[str, Transfer] = {}
        self._epochs: dict[str, int] = {}
        """up to which epoch links were opened"""
        self._linked = asyncio.Condition()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copier")
        self._room = threading.BoundedSemaphore(MAX_PENDING_WRITES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn: dict[str, asyncio.Lock] = {}

    @property
    def link_names(self) -> str:
        """The links in use, for `status`."""
        return ",".join(sorted({target.link.name for targets in self._targets.values() for target in targets}))

    # ------------------------------------------------------------ links

    async def connect(self, record: PipelineRecord) -> None:
        """Opens links to those stages of a token pipeline that own layers of ours."""
        self._drivers[record.pipeline] = (record.stages[0].name, record.epoch)
        old = self._targets.pop(record.pipeline, [])
        for target in old:
            await self._close_link(target)
        targets = []
        ranges = [stage.layers or (0, 0) for stage in record.stages]
        for index, layers in route(ranges, self._pool.layout.layers):
            stage = record.stages[index]
            try:
                offer = GrantOffer.decode(str(stage.detail.get("kv_offer", "")))
                if self._kind == "zmq":
                    offer = msgspec.structs.replace(offer, memory_address=None)
                link = await open_link(offer, self._pool, executor=self._copier)
            except (LinkError, ProtocolError) as error:
                logger.error("no link to %s: %s", stage.name, error)
                continue
            logger.info("layers %d:%d go to %s over %s", *layers, stage.name, link.name)
            targets.append(Target(stage.name, record.epoch, layers, offer, link))
        self._targets[record.pipeline] = targets
        async with self._linked:
            self._epochs[record.pipeline] = record.epoch
            self._linked.notify_all()

    async def aclose(self) -> None:
        for targets in self._targets.values():
            for target in targets:
                await self._close_link(target)
        self._copier.shutdown(wait=True, cancel_futures=True)

    async def _close_link(self, target: Target) -> None:
        try:
            await target.link.aclose()
        except LinkError as error:
            logger.warning("link to %s: %s", target.name, error)

    # ------------------------------------------------------------ from the compute thread

    def chunk_spans(self, step: Step, sequences: dict[str, StageSequence]) -> list[ChunkSpan]:
        """What a step's chunks hand off (those of sequences that have somewhere to go)."""
        spans = []
        for work in step.chunks:
            sequence = sequences[work.sequence_id]
            handoff = sequence.opened.handoff
            if handoff is not None:
                end = work.start + work.num_tokens
                digest = hash_tokens(pack_ids(sequence.tokens[:end]))
                spans.append(
                    ChunkSpan(
                        work.sequence_id, sequence.opened.attempt, work.start, end, sequence.blocks, handoff, digest
                    )
                )
        return spans

    def layer_done(self, spans: list[ChunkSpan], local_layer: int) -> None:
        """A layer's KV of these spans is in our pool."""
        for span in spans:
            self._room.acquire()
            self._loop.call_soon_threadsafe(self._start, span, self._pool.layout.first_layer + local_layer)

    def close(self, sequence: StageSequence) -> None:
        """Returns when nothing reads the sequence's blocks any more."""
        asyncio.run_coroutine_threadsafe(self._finish(sequence), self._loop).result()

    # ------------------------------------------------------------ on the event loop

    def _start(self, span: ChunkSpan, layer: int) -> None:
        transfer = self._transfers.setdefault(span.sequence_id, Transfer())
        transfer.num_pending += 1
        transfer.idle.clear()
        task = self._loop.create_task(self._write(span, layer, transfer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, span: ChunkSpan, layer: int, transfer: Transfer) -> None:
        try:
            target = await self._target(span.handoff, layer)
            lock = self._turn.setdefault(target.name, asyncio.Lock())
            async with lock:  # in order: the last layer's arrival means all are there
                if transfer.error is None:
                    await self._write_layer(span, layer, target)
        except LinkError as error:
            transfer.error = str(error)
        finally:
            self._room.release()
            transfer.num_pending -= 1
            if transfer.num_pending == 0:
                transfer.idle.set()

    async def _target(self, handoff: Handoff, layer: int) -> Target:
        """The owner of a layer; a grant may be here before the link it needs. Raises `LinkError`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINK_WAIT_S), self._linked:
                await self._linked.wait_for(lambda: self._epochs.get(handoff.pipeline, 0) >= handoff.epoch)
        for target in self._targets.get(handoff.pipeline, []):
            if target.epoch == handoff.epoch and target.layers[0] <= layer < target.layers[1]:
                return target
        raise LinkError(f"no link to layer {layer} of {handoff.pipeline} at epoch {handoff.epoch}")

    async def _write_layer(self, span: ChunkSpan, layer: int, target: Target) -> None:
        plan = plan_copies(
            self._pool.layout,
            span.source_blocks,
            target.offer.layout,
            span.handoff.blocks,
            (span.start, span.end),
            (layer, layer + 1),
        )
        await target.link.write(self._pool, plan)
        self.sent_bytes += plan.total_bytes
        if layer == target.layers[1] - 1:
            checksum = await asyncio.wrap_future(self._copier.submit(self._checksum, span, target.layers))
            arrived = KvArrived(
                target.epoch,
                span.sequence_id,
                span.attempt,
                target.layers,
                span.start,
                span.end - span.start,
                span.handoff.blocks,
                span.token_hash,
                checksum,
            )
            self._send(target.name, arrived)

    def _checksum(self, span: ChunkSpan, layers: tuple[int, int]) -> int:
        layout = self._pool.layout
        binding = SpanBinding(
            layout.fingerprint, span.sequence_id, layers, (span.start, span.end), span.token_hash
        )
        return span_checksum(self._pool.memory, layout, span.source_blocks, binding)

    async def _finish(self, sequence: StageSequence) -> None:
        opened = sequence.opened
        transfer = self._transfers.pop(opened.sequence_id, None)
        if transfer is not None and transfer.num_pending:
            await transfer.idle.wait()
        handoff = opened.handoff
        if handoff is None or handoff.pipeline not in self._drivers:
            return
        ended = HandoffEnded(
            handoff.epoch,
            opened.sequence_id,
            opened.attempt,
            self._stage_index,
            self._num_stages,
            None if transfer is None else transfer.error,
        )
        self._send(self._drivers[handoff.pipeline][0], ended)
