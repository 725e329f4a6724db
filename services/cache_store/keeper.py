"""Moves KV from the pools of token stages into the store's own: the store reads, so stages lose no time over it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.kv.checksum import SpanBinding, checksum_of, hash_tokens, slot_digests
from common.kv.errors import LinkError
from common.kv.geometry import Int64, plan_slots, span_slots
from common.kv.link import Link, close_reading, open_link
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.token_ids import ID_BYTES
from common.membership import PipelineRecord
from common.replica_messages import HeldReplica, ReplicaItem
from dejavu.errors import DejavuError
from services.cache_store.shelf import Replica, Shelf

logger = logging.getLogger(__name__)

SLICE_BYTES = 8 << 20
"""So much is copied before the event loop gets a turn."""
REOPEN_S = 1.0
"""Between two attempts to reach the stages of a pipeline."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The pool of one token stage."""

    offer: GrantOffer
    link: Link


@dataclass(frozen=True, slots=True)
class _Move:
    """An item with its slots on both sides."""

    item: ReplicaItem
    from_slots: Int64
    to_slots: Int64


class Keeper:
    """One store's pool and shelf, and its links into the pools of token pipelines."""

    def __init__(self, pool: KvPool, shelf: Shelf) -> None:
        self.received_bytes = 0
        self._pool = pool
        self._shelf = shelf
        self._sources: dict[str, list[_Source]] = {}
        self._records: dict[str, PipelineRecord] = {}
        self._reopening: dict[str, asyncio.Task[None]] = {}

    async def connect(self, record: PipelineRecord) -> None:
        """Opens links to all stages of a pipeline in the place of those that there are. Where one cannot be had, or is
        lost later, the pipeline's sequences are not kept until all can be had again. To one that is over there are
        none."""
        await self.disconnect(record.pipeline)
        if record.successor is None:
            self._records[record.pipeline] = record
            if not await self._open(record):
                self._reopen(record.pipeline)

    async def disconnect(self, pipeline: str) -> None:
        self._records.pop(pipeline, None)
        reopening = self._reopening.pop(pipeline, None)
        if reopening is not None:
            reopening.cancel()
            await asyncio.wait([reopening])
        await _close(self._sources.pop(pipeline, []))

    async def aclose(self) -> None:
        for pipeline in list(self._records):
            await self.disconnect(pipeline)

    def links(self) -> dict[str, str]:
        """The stages that are read from, and over which link."""
        return {source.offer.name: source.link.name for sources in self._sources.values() for source in sources}

    async def keep(self, pipeline: str, items: Sequence[ReplicaItem]) -> list[str]:
        """Copies the items; returns the keys of those that could not be kept."""
        sources = self._sources.get(pipeline)
        if sources is None:
            return [item.key for item in items]
        moves = [move for item in items if (move := self._move(pipeline, sources[0].offer, item)) is not None]
        kept = {move.item.key for move in moves}
        failed = [item.key for item in items if item.key not in kept]
        try:
            for part in self._slices(moves):
                await self._copy(sources, part)
                await asyncio.sleep(0)
        except LinkError as error:
            logger.warning("copying from %s: %s", pipeline, error)
            for item in items:
                self._shelf.abandon(item.key, time.monotonic())
            if self._sources.get(pipeline) is sources:
                self._reopen(pipeline)
            return [item.key for item in items]
        return failed

    def _reopen(self, pipeline: str) -> None:
        """Makes new links, in the background: nobody waits for a stage that cannot be reached."""
        broken = self._sources.pop(pipeline, [])
        task = asyncio.create_task(self._until_open(self._records[pipeline], broken))
        self._reopening[pipeline] = task

    async def _until_open(self, record: PipelineRecord, broken: Sequence[_Source]) -> None:
        await _close(broken)
        while not await self._open(record):  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(REOPEN_S)
        logger.info("%s is kept again", record.pipeline)

    async def _open(self, record: PipelineRecord) -> bool:
        sources: list[_Source] = []
        try:
            for stage in record.stages:
                offer = GrantOffer.decode(str(stage.detail.get("kv_offer", "")))
                sources.append(_Source(offer, await open_link(offer, self._pool)))
        except BaseException as error:
            await _close(sources)
            if not isinstance(error, DejavuError):
                raise
            logger.warning("nothing of %s is kept: %s", record.pipeline, error)
            return False
        self._sources[record.pipeline] = sources
        return True

    def held(self, key: str, token_ids: bytes) -> HeldReplica | None:
        """What a sequence with these tokens can have, with a checksum for each layer."""
        found = self._shelf.locate(key, token_ids, time.monotonic())
        if found is None:
            return None
        replica, num_tokens = found
        token_hash = hash_tokens(replica.token_ids[: num_tokens * ID_BYTES])
        layers = range(self._pool.layout.num_layers)
        checksums = [self._checksum(key, replica, num_tokens, layer, token_hash) for layer in layers]
        num_blocks = -(-num_tokens // self._pool.block_size)
        return HeldReplica(num_tokens, replica.blocks[:num_blocks], checksums)

    def _checksum(self, key: str, replica: Replica, num_tokens: int, layer: int, token_hash: bytes) -> int:
        """Of what was received, not of what lies there now: damage in our memory must show."""
        binding = SpanBinding(self._pool.layout.fingerprint, key, (layer, layer + 1), (0, num_tokens), token_hash)
        return checksum_of(replica.digests[2 * layer : 2 * layer + 2, :num_tokens], binding)

    def _move(self, pipeline: str, offer: GrantOffer, item: ReplicaItem) -> _Move | None:
        blocks = self._shelf.make_room(pipeline, item, time.monotonic())
        if blocks is None:
            return None
        token_range = (item.start, item.start + item.num_tokens)
        theirs = offer.layout
        table = [0] * (item.start // theirs.block_size) + item.blocks
        ours = self._pool.layout
        try:
            return _Move(
                item,
                span_slots(theirs, table, token_range, theirs.layers, theirs.heads),
                span_slots(ours, blocks, token_range, ours.layers, ours.heads),
            )
        except ValueError as error:
            logger.warning("bad blocks for %s: %s", item.key, error)
            self._shelf.forget(item.key)
            return None

    def _slices(self, moves: Sequence[_Move]) -> Iterator[list[_Move]]:
        """Whole items, as many as fit into a slice; a long one is cut."""
        max_tokens = max(1, SLICE_BYTES // (self._pool.layout.bytes_per_block // self._pool.block_size))
        part: list[_Move] = []
        room = max_tokens
        for move in moves:
            for piece in _cut(move, max_tokens):
                if piece.item.num_tokens > room and part:
                    yield part
                    part, room = [], max_tokens
                part.append(piece)
                room -= piece.item.num_tokens
        if part:
            yield part

    async def _copy(self, sources: Sequence[_Source], moves: Sequence[_Move]) -> None:
        layout = self._pool.layout
        from_slots = np.concatenate([move.from_slots for move in moves])
        to_slots = np.concatenate([move.to_slots for move in moves])
        for source in sources:
            theirs = source.offer.layout
            plan = plan_slots(theirs, from_slots, layout, to_slots, theirs.layers, theirs.heads)
            await source.link.read(self._pool, plan)
        digests = slot_digests(self._pool.memory, layout, to_slots, layout.layers, layout.heads)
        first = 0
        for move in moves:
            self._shelf.commit(move.item, digests[:, first : first + move.item.num_tokens])
            first += move.item.num_tokens
        self.received_bytes += len(to_slots) * layout.bytes_per_block // layout.block_size


def _cut(move: _Move, max_tokens: int) -> Iterator[_Move]:
    item = move.item
    if item.num_tokens <= max_tokens:
        yield move
        return
    for first in range(0, item.num_tokens, max_tokens):
        count = min(max_tokens, item.num_tokens - first)
        piece = ReplicaItem(item.key, item.start + first, count, [], b"")
        yield _Move(piece, move.from_slots[first : first + count], move.to_slots[first : first + count])


async def _close(sources: Sequence[_Source]) -> None:
    for source in sources:
        await close_reading(source.link, source.offer.name)
