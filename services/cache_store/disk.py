"""The disk tier of a store: what is on the shelf is written behind to files, which outlive the store.

One pass after the other compares shelf and disk and mends the difference, so nobody has to tell it what changed; what
grew several times between two passes is written once. The disk's thread copies from the pool while the shelf goes on:
if tokens were dropped meanwhile, the file is thrown away before it is visible.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.kv.checksum import hash_tokens
from common.kv.errors import LinkDamaged, LinkError, LinkFull, LinkRefused
from common.kv.file_link import FileLink
from common.kv.file_store import FileStore
from common.kv.geometry import CopyPlan, plan_slots, span_slots
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.kv.token_ids import ID_BYTES
from services.cache_store.segments import (
    Segment,
    SegmentNote,
    agreeing,
    chain,
    new_note,
    next_segment,
    segment_name,
    sequence_key,
)
from services.cache_store.shelf import Replica, Shelf

logger = logging.getLogger(__name__)

BUSY_SHARE = 0.1
"""At most so much of the time is spent on passes: the more there is to write, the rarer they are and the larger the
files, which are less work for each token."""
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 3.0
"""Between two passes. The tokens of so long are lost, and computed again, if everything dies."""
FAILURE_PAUSE_S = 5.0
"""So long nothing is written after the disk was full, or failed."""
TIMEOUT_S = 10.0
"""Of reading or writing one segment: somebody may wait for a replica that is behind it."""
NOT_KNOWN = b""
"""The hash of a segment whose file may hold this or that: no tokens agree with it."""


class DiskTier:
    """The files of one store. Run it with `run`; from one event loop."""

    def __init__(self, files: FileStore, pool: KvPool, shelf: Shelf) -> None:
        self._files = files
        self._pool = pool
        self._shelf = shelf
        self._segments: dict[str, list[Segment]] = {}
        self._undeleted: set[str] = set()
        """files of no use that could not be deleted yet"""
        self._paused_until_s = 0.0
        self._used_bytes = 0
        self._one_at_a_time = asyncio.Lock()
        self._counts = {"written_bytes": 0, "read_bytes": 0, "recalled": 0, "failures": 0, "full": 0, "damaged": 0}

    @classmethod
    async def start(cls, directory: Path, max_bytes: int, pool: KvPool, shelf: Shelf) -> DiskTier:
        """Puts what is in the directory on the shelf, asleep; what is damaged or of another model is deleted. Raises
        `LinkError`."""
        files = await FileStore.start(directory, max_bytes=max_bytes, timeout_s=TIMEOUT_S)
        tier = cls(files, pool, shelf)
        try:
            await tier._find()
            tier._used_bytes = await files.used_bytes()
        except BaseException:
            await files.aclose()
            raise
        return tier

    async def run(self) -> None:
        """Writes behind until cancelled."""
        while True:
            started_s = time.monotonic()
            await self.write_behind()
            took_s = time.monotonic() - started_s
            pause_s = took_s / BUSY_SHARE - took_s
            await asyncio.sleep(min(max(pause_s, MIN_PAUSE_S), MAX_PAUSE_S))

    async def aclose(self) -> None:
        await self._files.aclose()

    def figures(self) -> dict[str, Any]:
        """For `status`."""
        return {
            "used_bytes": self._used_bytes,
            "max_bytes": self._files.max_bytes,
            "sequences": len(self._segments),
            "tokens": sum(segments[-1].end for segments in self._segments.values() if segments),
            "asleep": sum(replica.is_asleep for replica in self._shelf.replicas.values()),
            **self._counts,
        }

    # ------------------------------------------------------------ writing

    async def write_behind(self) -> None:
        """One pass: deletes what is not on the shelf any more, writes what is new there."""
        gone = [key for key in self._segments if key not in self._shelf.replicas]
        for key in gone:
            async with self._one_at_a_time:
                if key not in self._shelf.replicas:
                    await self._delete(key, self._segments.pop(key))
        undeleted = list(self._undeleted) if time.monotonic() >= self._paused_until_s else []
        if undeleted:
            async with self._one_at_a_time:
                await self._delete_files(undeleted)
        behind = [(key, each) for key, each in self._shelf.replicas.items() if each.num_on_disk < each.num_tokens]
        for key, replica in behind:
            if time.monotonic() >= self._paused_until_s:
                await self._save(key, replica)
        if not (gone or behind or undeleted):
            return
        try:
            self._used_bytes = await self._files.used_bytes()
        except LinkError as error:
            self._note_failure(error)

    async def _save(self, key: str, replica: Replica) -> None:
        num_tokens = replica.num_tokens  # it may grow, or be cut, while we write
        try:
            while replica.num_on_disk < min(num_tokens, replica.num_tokens):
                async with self._one_at_a_time:
                    if not self._is_kept(key, replica) or not await self._append(key, replica):
                        return
        except LinkFull as error:
            if not self._counts["full"]:
                logger.warning("from here on replicas may be in memory only: %s", error)
            self._counts["full"] += 1
            self._paused_until_s = time.monotonic() + FAILURE_PAUSE_S
        except LinkError as error:
            self._note_failure(error)

    async def _append(self, key: str, replica: Replica) -> bool:
        """Writes the replica's next segment. False: it was changed meanwhile."""
        known = agreeing(self._segments.get(key, []), replica.token_ids)
        if not known or known[-1].end < replica.num_tokens:
            start, end = next_segment(known, replica.num_tokens)
            version, token_ids = replica.version, replica.token_ids[: end * ID_BYTES]
            segment = Segment(start, end, hash_tokens(token_ids))
            note = new_note(start, token_ids, replica.digests[:, start:end])
            layout = self._layout(end - start)
            plan = self._plan(layout, replica.blocks, start, end, to_disk=True)
            async with _closing(await self._files.create(segment_name(key, start), layout)) as link:
                await link.write(self._pool, plan)
                if not self._is_kept(key, replica) or replica.version != version:
                    return False
                await self._finish(key, [*known, segment], link, note)
            self._counts["written_bytes"] += layout.total_bytes
            await self._delete_files(list(self._undeleted))
        self._count_on_disk(key, replica)
        return True

    async def _finish(self, key: str, segments: Sequence[Segment], link: FileLink, note: SegmentNote) -> None:
        """The last segment, which has been written, takes the place of all that begin where it does, or behind; these
        are to be deleted. Raises `LinkError`; where nobody can say then what is in the file, no token is counted on
        that would be in it."""
        last = segments[-1]
        before = self._segments.get(key, [])
        try:
            await self._files.finish(link, segment_name(key, last.start), msgspec.msgpack.encode(note))
        except LinkError as error:
            if error.may_still_write:
                doubtful = Segment(last.start, last.end, NOT_KNOWN)
                others = [segment for segment in before if segment.start != last.start]
                self._segments[key] = sorted([*others, doubtful], key=lambda segment: segment.start)
                if (replica := self._shelf.replicas.get(key)) is not None:
                    self._count_on_disk(key, replica)
            raise
        self._undeleted.discard(segment_name(key, last.start))
        self._segments[key] = [segment for segment in segments if segment.start < last.start] + [last]
        self._undeleted |= {segment_name(key, segment.start) for segment in before if segment.start > last.start}

    def _count_on_disk(self, key: str, replica: Replica) -> None:
        """Of its present text: that may have changed while another was written."""
        whole = agreeing(self._segments[key], replica.token_ids)
        replica.num_on_disk = min(whole[-1].end if whole else 0, replica.num_tokens)

    def _is_kept(self, key: str, replica: Replica) -> bool:
        return self._shelf.replicas.get(key) is replica and bool(replica.blocks)

    # ------------------------------------------------------------ reading

    async def recall(self, key: str) -> None:
        """Wakes a replica, as far as it is intact, if it is asleep and there is room in memory."""
        async with self._one_at_a_time:
            asleep = self._shelf.replicas.get(key)
            if asleep is None or not asleep.is_asleep:
                return
            segments = agreeing(self._segments.get(key, []), asleep.token_ids)
            awake = self._shelf.wake(asleep, segments[-1].end if segments else 0, time.monotonic())
            if awake is None:
                return
            try:
                await self._read_all(key, segments, awake)
            except LinkError as error:
                self._note_failure(error)
                self._shelf.let_go(awake)
                return
            except BaseException:
                self._shelf.let_go(awake)
                raise
            awake.num_on_disk = awake.num_tokens
            self._shelf.woken(key, asleep, awake)

    async def _read_all(self, key: str, segments: Iterable[Segment], replica: Replica) -> None:
        """As far as they are intact. Raises `LinkError`."""
        try:
            for segment in segments:
                await self._read(key, segment, replica)
            self._counts["recalled"] += 1
        except LinkDamaged as error:
            await self._cut_off(key, replica.num_tokens, error)

    async def _read(self, key: str, segment: Segment, replica: Replica) -> None:
        async with _closing(await self._files.open(segment_name(key, segment.start), self._pool)) as link:
            digests = self._note(link).digest_array()
            if digests.shape[1] != segment.end - segment.start:
                raise LinkDamaged(f"{segment_name(key, segment.start)} has {digests.shape[1]} tokens, not {segment}")
            plan = self._plan(link.layout, replica.blocks, segment.start, segment.end, to_disk=False)
            await link.read(self._pool, plan)
        replica.put(segment.start, digests)
        self._counts["read_bytes"] += link.layout.total_bytes

    async def _cut_off(self, key: str, num_tokens: int, error: LinkDamaged) -> None:
        """What begins there, or behind, is void."""
        logger.warning("of %s only %d tokens are left: %s", key, num_tokens, error)
        self._counts["damaged"] += 1
        segments = self._segments[key]
        self._segments[key] = [segment for segment in segments if segment.end <= num_tokens]
        await self._delete(key, [segment for segment in segments if segment.end > num_tokens])

    async def _find(self) -> None:
        for name in await self._files.remove_damaged():
            logger.warning("%s was damaged and is gone", name)
            self._counts["damaged"] += 1
        notes: dict[str, list[SegmentNote]] = {}
        names = await self._files.keys()
        for name in names:
            note = await self._try_note(name)
            if note is not None:
                notes.setdefault(sequence_key(name), []).append(note)
        used: set[str] = set()
        for key, found in notes.items():
            segments, token_ids = chain(found)
            if segments:
                self._segments[key] = segments
                self._shelf.found(key, token_ids)
                used.update(segment_name(key, segment.start) for segment in segments)
        for name in names.keys() - used:
            await self._files.delete(name)

    async def _try_note(self, name: str) -> SegmentNote | None:
        """What goes with a file; None where it is of no use here."""
        try:
            async with _closing(await self._files.open(name, self._pool)) as link:
                return self._note(link)
        except (LinkDamaged, LinkRefused) as error:
            logger.warning("%s is void: %s", name, error)
            self._counts["damaged"] += 1
            return None

    def _note(self, link: FileLink) -> SegmentNote:
        """Raises `LinkDamaged`, `LinkRefused`."""
        try:
            note = msgspec.msgpack.decode(link.note, type=SegmentNote)
            num_planes = len(note.digest_array())
        except (msgspec.DecodeError, ValueError) as error:
            raise LinkDamaged(f"{self._pool.name} cannot read what goes with a file: {error}") from error
        if link.layout != self._layout(note.num_tokens) or num_planes != 2 * link.layout.num_layers:
            raise LinkRefused(f"{self._pool.name} has other layers or heads than {link.layout}")
        return note

    # ------------------------------------------------------------ files

    async def _delete(self, key: str, segments: Iterable[Segment]) -> None:
        names = [segment_name(key, segment.start) for segment in segments]
        self._undeleted.update(names)
        await self._delete_files(names)

    async def _delete_files(self, names: Iterable[str]) -> None:
        """Where it fails, the next pass tries again."""
        try:
            for name in names:
                await self._files.delete(name)
                self._undeleted.discard(name)
        except LinkError as error:
            self._note_failure(error)

    def _layout(self, num_tokens: int) -> PoolLayout:
        """A segment's file: one block."""
        return msgspec.structs.replace(self._pool.layout, num_blocks=1, block_size=num_tokens)

    def _plan(self, file: PoolLayout, blocks: Sequence[int], start: int, end: int, *, to_disk: bool) -> CopyPlan:
        pool = self._pool.layout
        ours = span_slots(pool, blocks, (start, end), pool.layers, pool.heads)
        theirs = np.arange(end - start, dtype=np.int64)
        if to_disk:
            return plan_slots(pool, ours, file, theirs, pool.layers, pool.heads)
        return plan_slots(file, theirs, pool, ours, pool.layers, pool.heads)

    def _note_failure(self, error: LinkError) -> None:
        """The first of several is told; `status` counts them all."""
        if not self._counts["failures"]:
            logger.warning("the disk fails: %s", error)
        self._counts["failures"] += 1
        self._paused_until_s = time.monotonic() + FAILURE_PAUSE_S


@asynccontextmanager
async def _closing(link: FileLink) -> AsyncIterator[FileLink]:
    """Where the closing fails, too, what was wrong before is what counts: above all that we were cancelled."""
    try:
        yield link
    except BaseException:
        with suppress(LinkError):
            await link.aclose()
        raise
    await link.aclose()
