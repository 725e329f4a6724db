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
    HeldReplica,
    Locate,
    Located,
    ReplicaItem,
    Replicate,
    Replicated,
    replica_key,
)
from services.cache_store.shelf import Shelf
from tests.unit.fleet_links import U64, checksum
from tests.unit.fleet_stages import NUM_LAYERS, FleetPeers, FleetTokenStage, drive
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
        self.pool: list[dict[int, int]] = [{} for _ in range(NUM_LAYERS)]
        self.inbox: deque[tuple[str, Any]] = deque()
        self.records: dict[str, PipelineRecord] = {}
        self.answers: dict[str, Replicated] = {}
        """to the last batch of every pipeline"""
        self.sources: dict[str, list[FleetTokenStage | None]] = {}
        """the stages that each pipeline is read from"""

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
        stages = () if record.successor else record.stages
        self.sources[claim.pipeline] = [self.world.token_stage(stage.incarnation) for stage in stages]
        self.peers.send(sender, Claimed(self.name, claim.pipeline, claim.epoch, keys))

    def _serve(self, sender: str, message: Replicate | Locate) -> None:
        match message:
            case Replicate(pipeline, epoch, batch, items, over):
                if self.shelf.begin(pipeline, epoch, batch, items):
                    for key in over:
                        self.shelf.ended(pipeline, key)
                    failed = [item.key for item in items if not self._keep(pipeline, item)]
                    self.answers[pipeline] = Replicated(self.name, epoch, batch, failed)
                answer = self.answers.get(pipeline)
                if answer is not None and (answer.epoch, answer.batch) == (epoch, batch):
                    self.peers.send(sender, answer)
            case Locate(pipeline, epoch, sequence_id, attempt, ids, placed):
                self.shelf.take_over(pipeline, replica_key(sequence_id), placed)
                found = self.shelf.locate(replica_key(sequence_id), ids, 0.0)
                held = None
                if found is not None:
                    replica, count = found
                    checksums = [checksum(digests.tolist()) for digests in replica.digests[:, :count]]
                    held = HeldReplica(count, list(replica.blocks), checksums)
                self.peers.send(sender, Located(self.name, epoch, sequence_id, attempt, held))

    def _keep(self, pipeline: str, item: ReplicaItem) -> bool:
        sources = self.sources.get(pipeline, [])
        blocks = self.shelf.make_room(pipeline, item, 0.0)
        if blocks is None:
            return False
        living = [source for source in sources if source is not None and self.world.is_alive(source)]
        if not living or len(living) < len(sources):
            self.shelf.abandon(item.key, 0.0)
            return False
        start, offset, count = item.start, item.start % BLOCK_SIZE, item.num_tokens
        theirs = slots(item.blocks, offset, offset + count, BLOCK_SIZE)
        ours = slots(blocks, start, start + count, STORE_BLOCK_SIZE)
        digests = np.zeros((NUM_LAYERS, count), dtype=np.uint64)
        for layer, pool in (each for source in living for each in source.pool_of_kv.items()):
            values = [pool[place] for place in theirs]
            self.pool[layer].update(zip(ours, values, strict=True))
            digests[layer] = [value & U64 for value in values]
        self.shelf.commit(item, digests)
        return True
