"""A cache store among several pipelines, over made-up KV."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from common.membership import MemberJoined, MemberLost, PipelineRecord
from common.messages import decode_store_inbox
from common.replica_messages import (
    Claim,
    Claimed,
    Forget,
    HeldReplica,
    Locate,
    Located,
    ReplicaItem,
    Replicate,
    Replicated,
    replica_key,
)
from services.cache_store.shelf import Shelf
from tests.unit.fleet_stages import U64, FleetPeers, FleetTokenStage, checksum, drive
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, slots

if TYPE_CHECKING:
    from tests.unit.fleet_world import Fleet

NUM_STORE_BLOCKS = 60


class FleetStore:
    """The real shelf over made-up KV; messages are worked off in order, as `CacheStore` does."""

    def __init__(self, world: Fleet, name: str, incarnation: str) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.peers = FleetPeers(world, f"{name}.{incarnation}")
        self.shelf = Shelf(NUM_STORE_BLOCKS, STORE_BLOCK_SIZE)
        self.pool: dict[int, int] = {}
        self.inbox: deque[tuple[str, Any]] = deque()
        self.records: dict[str, PipelineRecord] = {}
        self.sources: dict[str, tuple[int, FleetTokenStage | None]] = {}

    def arrive(self, peer: str, frame: bytes) -> None:
        self.inbox.append((peer.rpartition(".")[0], decode_store_inbox(frame)))

    def can_hear(self, kind: str) -> bool:
        return True

    def hear(self, kind: str, event: Any) -> None:
        if isinstance(event, PipelineRecord) and event.role == "token_stage":
            self.sources.pop(event.pipeline, None)
            self.records[event.pipeline] = event
            if event.successor is not None:
                self.inbox.append(("", Claim(event.pipeline, event.epoch)))
        elif isinstance(event, MemberJoined) and event.record.role == "token_stage":
            drive(self.peers.connect(event.record.name, event.record.endpoint))
        elif isinstance(event, MemberLost):
            self.peers.drop(event.record.name, event.record.endpoint)

    def ways(self) -> list[Callable[[], None]]:
        return [self.work] * bool(self.inbox)

    def work(self) -> None:
        sender, message = self.inbox.popleft()
        if isinstance(message, Claim):
            self._claim(sender, message)
        elif self.shelf.accepts(message.pipeline, message.epoch):
            self._serve(sender, message)

    def _claim(self, sender: str, claim: Claim) -> None:
        record = self.records.get(claim.pipeline)
        if record is None or record.epoch < claim.epoch:
            self.inbox.append((sender, claim))
            return
        if record.successor is None:
            drive(self.peers.connect(record.stages[0].name, record.stages[0].endpoint))
        keys = self.shelf.claim(claim.pipeline, claim.epoch, claim.batch, 60.0)
        if keys is None or record.epoch > claim.epoch:
            return
        source = None if record.successor else self.world.token_stage(record.stages[0].incarnation)
        self.sources[claim.pipeline] = (claim.epoch, source)
        self.peers.send(sender, Claimed(self.name, claim.pipeline, claim.epoch, keys))

    def _serve(self, sender: str, message: Replicate | Forget | Locate) -> None:
        match message:
            case Replicate(pipeline, epoch, batch, items):
                if not self.shelf.begin(pipeline, epoch, batch, items):
                    return
                failed = [item.key for item in items if not self._keep(pipeline, item)]
                self.peers.send(sender, Replicated(self.name, epoch, batch, failed))
            case Forget(pipeline, _, keys):
                for key in keys:
                    self.shelf.ended(pipeline, key)
            case Locate(pipeline, epoch, sequence_id, attempt, ids, placed):
                self.shelf.take_over(pipeline, replica_key(sequence_id), placed)
                found = self.shelf.locate(replica_key(sequence_id), ids, 0.0)
                held = None
                if found is not None:
                    replica, count = found
                    held = HeldReplica(count, list(replica.blocks), [checksum(replica.digests[0, :count].tolist())])
                self.peers.send(sender, Located(self.name, epoch, sequence_id, attempt, held))

    def _keep(self, pipeline: str, item: ReplicaItem) -> bool:
        source = self.sources.get(pipeline, (0, None))[1]
        blocks = self.shelf.make_room(pipeline, item, 0.0)
        if blocks is None:
            return False
        if source is None or not self.world.is_alive(source):
            self.shelf.abandon(item.key, 0.0)
            return False
        start, offset, count = item.start, item.start % BLOCK_SIZE, item.num_tokens
        values = [source.pool_of_kv[place] for place in slots(item.blocks, offset, offset + count, BLOCK_SIZE)]
        self.pool.update(zip(slots(blocks, start, start + count, STORE_BLOCK_SIZE), values, strict=True))
        self.shelf.commit(item, np.array([[value & U64 for value in values]], dtype=np.uint64))
        return True
