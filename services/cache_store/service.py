"""Wiring of a cache store: membership, an inbox that is worked off in order, answers to token drivers."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common import messages
from common.kv.errors import LinkError
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.loop_monitor import LoopMonitor
from common.membership import MemberJoined, MemberLost, Membership, PipelineRecord
from common.messages import StatsQuery, StatsReply, Stop, StoreInboxMessage
from common.model.kv_layout import fitting_layout
from common.model.spec import ModelSpec, load_spec
from common.peers import Peers, beat, understood
from common.presence import present
from common.process import own_incarnation
from common.replica_messages import Claim, Claimed, Locate, Located, Replicate, Replicated, replica_key
from common.service import ServiceOptions, own_record
from services.cache_store.disk import DiskTier
from services.cache_store.keeper import Keeper
from services.cache_store.shelf import Shelf

logger = logging.getLogger(__name__)

RECORD_WAIT_S = 0.5
SWEEP_S = 5.0
UNCLAIMED_S = 60.0
"""How long replicas of a pipeline outlive the epoch that made them, unless the next one uses them."""
MAX_WAITING_MESSAGES = 65536
MAX_RECALLS = 1024
FLUSH_LIMIT_S = 2.0
"""So long an orderly end waits for the disk."""


@dataclass(frozen=True, slots=True)
class StoreOptions(ServiceOptions):
    """The command line of a cache store."""

    kv_memory_bytes: int
    block_size: int
    disk_memory_bytes: int
    disk_dir: Path
    """Where replicas are written behind to; nothing is written with `disk_memory_bytes` 0."""


class CacheStore:
    """One cache store. Use `await CacheStore.serve(options, stop)`."""

    def __init__(self, options: StoreOptions, spec: ModelSpec) -> None:
        self._options = options
        self._incarnation = own_incarnation()
        self._peers = Peers(f"{options.name}.{self._incarnation}")
        layout = fitting_layout(spec, (0, spec.num_layers), options.block_size, options.kv_memory_bytes)
        self._pool = KvPool.create(layout, name=options.name)
        self._shelf = Shelf(layout.num_blocks, layout.block_size)
        self._keeper = Keeper(self._pool, self._shelf)
        self._disk: DiskTier | None = None
        self._recalls: asyncio.Queue[tuple[str, Locate]] = asyncio.Queue(MAX_RECALLS)
        self._queue: asyncio.Queue[tuple[str, StoreInboxMessage]] = asyncio.Queue(MAX_WAITING_MESSAGES)
        self._records: dict[str, PipelineRecord] = {}
        self._record_changed = asyncio.Condition()
        self._answers: dict[str, Replicated] = {}
        """to the last batch of every pipeline"""
        self._routers: set[str] = set()
        self._monitor = LoopMonitor()
        self._counters = {"bad_frames": 0, "refused_frames": 0, "batches": 0}
        self._stop: asyncio.Event
        self._membership: Membership

    @classmethod
    async def serve(cls, options: StoreOptions, stop: asyncio.Event) -> None:
        """Runs a store until `stop` is set. Raises `ConfigurationError`."""
        store = cls(options, load_spec(options.model, options.dtype))
        server = await PoolServer.start(store._pool, options.host, store._incarnation)
        try:
            await store._open_disk()
            async with present(options, store._peers, store._on_frames) as (endpoint, _, store._membership):
                detail = {"kv_offer": server.offer.encode()}
                record = own_record(options.name, "cache_store", store._incarnation, endpoint, detail)
                await store._membership.register(record)
                await store._live(stop)
        finally:
            await store._keeper.aclose()
            await store._close_disk()
            await server.aclose()
            store._pool.close()

    async def _live(self, stop: asyncio.Event) -> None:
        self._stop = stop
        beating = beat(self._peers, lambda: self._routers, self._options.name, self._incarnation, lambda: 0.0)
        work = [self._watch_members(), self._watch_pipelines(), self._work(), self._recall(), self._sweep()]
        work += [beating, self._monitor.watch()]
        if self._disk is not None:
            work.append(self._disk.run())
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each) for each in work]
            await stop.wait()
            for task in running:
                task.cancel()

    async def _open_disk(self) -> None:
        options = self._options
        if not options.disk_memory_bytes:
            return
        try:
            self._disk = await DiskTier.start(options.disk_dir, options.disk_memory_bytes, self._pool, self._shelf)
            logger.info("%d replicas are on disk in %s", len(self._shelf.replicas), options.disk_dir)
        except LinkError as error:
            # requests can be served without it, and a disk that fails must not end a store that is respawned
            logger.error("no disk tier: %s", error)

    async def _close_disk(self) -> None:
        if self._disk is None:
            return
        try:
            async with asyncio.timeout(FLUSH_LIMIT_S):
                await self._disk.write_behind()
        except TimeoutError:
            logger.warning("the newest tokens of replicas are not on disk: it took too long")
        await self._disk.aclose()

    async def _watch_members(self) -> None:
        async for event in self._membership.watch():
            match event:
                case MemberJoined(record):
                    if record.role in ("router", "token_stage"):
                        await self._peers.connect(record.name, record.endpoint)
                    if record.role == "router":
                        self._routers.add(record.name)
                case MemberLost(record):
                    self._routers.discard(record.name)
                    self._peers.drop(record.name, record.endpoint)

    async def _watch_pipelines(self) -> None:
        async for record in self._membership.watch_pipelines():
            if record.role == "token_stage":
                # what is being read for the epoch before would be of no use, and its stage may never answer
                await self._keeper.disconnect(record.pipeline)
                async with self._record_changed:
                    self._records[record.pipeline] = record
                    self._record_changed.notify_all()
                if record.successor is not None:  # what is kept of it expires, even if nobody lives to claim it
                    await self._queue.put(("", Claim(record.pipeline, record.epoch)))

    # ------------------------------------------------------------ messages

    def _on_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        match message := understood(messages.decode_store_inbox, peer, frames, self._counters):
            case None:
                pass
            case StatsQuery():
                self._answer_stats(message)
            case Stop():
                self._stop.set()
            case _:
                try:
                    self._queue.put_nowait((peer.decode(errors="replace").rpartition(".")[0], message))
                except asyncio.QueueFull:
                    logger.warning("%s from %r dropped: too many wait", type(message).__name__, peer[:64])

    async def _work(self) -> None:
        """One after the other: whoever hears an answer knows that everything before it is over."""
        while True:
            sender, message = await self._queue.get()
            self._shelf.standing = self._membership.standing()
            match message:
                case Claim():
                    await self._claim(sender, message)
                case Replicate():
                    await self._replicate(sender, message)
                case Locate():
                    is_asleep = self._shelf.is_asleep(replica_key(message.sequence_id))
                    if self._disk is None or not is_asleep or self._recalls.full():
                        self._locate(sender, message)
                    else:
                        self._recalls.put_nowait((sender, message))  # nobody else waits for the disk

    async def _replicate(self, sender: str, asked: Replicate) -> None:
        pipeline, epoch, batch = asked.pipeline, asked.epoch, asked.batch
        answer = self._answers.get(pipeline)
        if answer is None or (answer.epoch, answer.batch) != (epoch, batch):  # else it, or our answer, had been lost
            if not self._counted(self._shelf.begin(pipeline, epoch, batch, asked.items)):
                return
            for key in asked.over:
                self._shelf.ended(pipeline, key)
            failed = await self._keeper.keep(pipeline, asked.items)
            self._counters["batches"] += 1
            answer = self._answers[pipeline] = Replicated(self._options.name, epoch, batch, failed)
        self._peers.send(sender, answer)

    def _locate(self, sender: str, locate: Locate) -> None:
        if self._accepts(locate.pipeline, locate.epoch):
            key = replica_key(locate.sequence_id)
            self._shelf.take_over(locate.pipeline, key, locate.placed)
            held = self._keeper.held(key, locate.token_ids)
            answer = Located(self._options.name, locate.epoch, locate.sequence_id, locate.attempt, held)
            self._peers.send(sender, answer)

    async def _recall(self) -> None:
        """Answers who asks for what is only on disk."""
        while True:
            sender, locate = await self._recalls.get()
            if self._disk is not None:
                await self._disk.recall(replica_key(locate.sequence_id))
            self._shelf.standing = self._membership.standing()
            self._locate(sender, locate)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._shelf.sweep(time.monotonic())

    def _accepts(self, pipeline: str, epoch: int) -> bool:
        return self._counted(self._shelf.accepts(pipeline, epoch))

    def _counted(self, is_accepted: bool) -> bool:
        self._counters["refused_frames"] += not is_accepted
        return is_accepted

    async def _claim(self, sender: str, claim: Claim) -> None:
        record = await self._record(claim.pipeline, claim.epoch)
        if record is None:
            self._queue.put_nowait((sender, claim))  # our watch is behind
            return
        if record.successor is None:  # the driver may become known to us as a member only later
            await self._peers.connect(record.stages[0].name, record.stages[0].endpoint)
        keys = self._shelf.claim(claim.pipeline, claim.epoch, claim.batch, time.monotonic() + UNCLAIMED_S)
        if keys is None or record.epoch > claim.epoch:
            return
        await self._keeper.connect(record)
        self._peers.send(sender, Claimed(self._options.name, claim.pipeline, claim.epoch, keys))

    async def _record(self, pipeline: str, epoch: int) -> PipelineRecord | None:
        """The pipeline's record as soon as the watch shows what the driver has seen already."""

        def is_there() -> bool:
            return pipeline in self._records and self._records[pipeline].epoch >= epoch

        try:
            async with asyncio.timeout(RECORD_WAIT_S), self._record_changed:
                await self._record_changed.wait_for(is_there)
        except TimeoutError:
            return None
        return self._records[pipeline]

    def _answer_stats(self, query: StatsQuery) -> None:
        replicas = self._shelf.replicas.values()
        stats = {
            "loop": self._monitor.figures(),
            "counters": dict(self._counters),
            "kv_blocks": self._shelf.kv_blocks(),
            "replicas": {
                "sequences": len(replicas),
                "tokens": sum(replica.num_tokens for replica in replicas),
                "received_bytes": self._keeper.received_bytes,
            },
            "link": ",".join(sorted(set(self._keeper.links().values()))),
            "peers": self._keeper.links(),
            "disk": None if self._disk is None else self._disk.figures(),
        }
        self._peers.send(query.reply_to, StatsReply(query.query_id, self._options.name, msgspec.msgpack.encode(stats)))
