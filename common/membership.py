"""Who lives, who leads, which pipelines are published: records in etcd, most on their process's lease."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Self

import msgspec

from common.etcd.client import (
    Compare,
    EtcdClient,
    KeyValue,
    Put,
    WatchEvent,
    backoff_s,
    has_mod_revision,
    is_absent,
)
from common.etcd.election import NOBODY, Election, LeaderChanged
from common.etcd.errors import EtcdError, EtcdLeaseNotFound
from common.etcd.follow import Snapshot, follow
from common.etcd.lease import Lease
from common.etcd.values import decode_value
from dejavu.errors import DejavuError

__all__ = [
    "NOBODY",
    "Election",
    "LeaderChanged",
    "MemberEvent",
    "MemberJoined",
    "MemberLost",
    "MemberRecord",
    "MemberSuperseded",
    "Membership",
    "PipelineRecord",
    "SnapshotEnd",
]

logger = logging.getLogger(__name__)

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Word = Annotated[str, msgspec.Meta(max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=2048)]
Endpoint = Annotated[str, msgspec.Meta(pattern=r"^tcp://[^\s/]{1,255}:[0-9]{1,5}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]

GONE = "gone"
"""The state of an incarnation that has ended for certain: its parent saw it end, it left, or it was taken for dead.
That its key has vanished may also mean that etcd was away."""
LEAVE_LIMIT_S = 1.0


class MemberRecord(msgspec.Struct, frozen=True):
    """What a service tells the others. `layers` is [first, end); `endpoint` is that of its inbox; `pid` is its number
    on `machine` (`common.process.own_machine`), while `host` is for people."""

    name: Name
    role: Word
    incarnation: Word
    pid: Count
    host: Text
    endpoint: Endpoint
    pipeline: Name | None
    stage_index: Count | None
    num_stages: Count | None
    layers: tuple[Count, Count] | None
    state: Word
    detail: Annotated[dict[Word, Text | int | float], msgspec.Meta(max_length=32)] = {}
    machine: Word = ""


class PipelineRecord(msgspec.Struct, frozen=True):
    """The processes of a pipeline, first stage first. `epoch` rises with every publication. With a `successor` the
    pipeline is over: its processes are to form that one, in the other role."""

    pipeline: Name
    role: Word
    epoch: int
    stages: Annotated[tuple[MemberRecord, ...], msgspec.Meta(min_length=1, max_length=256)]
    successor: Name | None = None


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A member (or a new incarnation of a lost one) is there."""

    record: MemberRecord


@dataclass(frozen=True, slots=True)
class MemberLost:
    """This incarnation is gone: its lease lapsed, it left, or another one took its name."""

    record: MemberRecord


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """All members of the beginning have been told; what follows is news."""


MemberEvent = MemberJoined | MemberLost | SnapshotEnd


class MemberSuperseded(DejavuError):
    """Another incarnation has taken this process's name, so this process must end."""


@dataclass(slots=True)
class Roster:
    """Which members there are (pure: each call returns what there is to tell). `is_settled` is false for one
    time to live after an outage of etcd: absent members are kept then, as `missing`, until `settle()`. Those that are
    said to be `GONE` are not."""

    members: dict[str, MemberRecord] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    def put(self, record: MemberRecord) -> list[MemberEvent]:
        known = self.members.get(record.name)
        self.missing.discard(record.name)
        if record.state == GONE:
            self.members.pop(record.name, None)
            return [] if known is None else [MemberLost(known)]
        self.members[record.name] = record
        if known is None:
            return [MemberJoined(record)]
        return [] if known.incarnation == record.incarnation else [MemberLost(known), MemberJoined(record)]

    def delete(self, name: str, is_settled: bool) -> list[MemberEvent]:
        if name in self.members:
            self.missing.add(name)
        return self.settle() if is_settled else []

    def replace(self, records: Iterable[MemberRecord], is_settled: bool) -> list[MemberEvent]:
        """Takes a complete list of the members there are."""
        found = {record.name: record for record in records}
        self.missing.update(self.members.keys() - found.keys())
        events = [event for record in found.values() for event in self.put(record)]
        return events + (self.settle() if is_settled else [])

    def settle(self) -> list[MemberEvent]:
        """Gives up those still missing."""
        lost = [self.members.pop(name) for name in sorted(self.missing)]
        self.missing.clear()
        return [MemberLost(record) for record in lost]


class Membership:
    """Use as `async with Membership(client, cluster) as membership`: holds a lease for the whole block.

    Entering raises `EtcdUnavailable` (a wrong url should be noticed); later outages only delay the writing.
    The block is cancelled and `MemberSuperseded` raised when another incarnation takes over the name.
    """

    def __init__(self, client: EtcdClient, cluster: str, lease_ttl_s: float = 3.0) -> None:
        self._client = client
        self._members = member_key(cluster, "")
        self._pipelines = f"/dejavu/{cluster}/pipelines/"
        self._record: MemberRecord | None = None
        self._registered_on = 0
        """the lease on which our record is, or was last"""
        self._num_writings = 0
        self._writing = asyncio.Lock()
        self._tasks = asyncio.TaskGroup()
        self._keeper: asyncio.Task[None]
        self.lease = Lease(client, lease_ttl_s, self._reconcile)

    async def __aenter__(self) -> Self:
        await self.lease.grant()
        await self._tasks.__aenter__()
        self._keeper = self._tasks.create_task(self.lease.keep())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._keeper.cancel()
        try:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            await self._tasks.__aexit__(*((kind, error, None) if is_cancelled else (None, None, None)))
        except BaseExceptionGroup as group:
            # the keeper is the only task there is
            raise group.exceptions[0] from None
        finally:
            await self._leave()

    def is_seen(self) -> bool:
        """Whether it is certain that others see our record, unless they have taken us for dead: that we hear nothing of
        those who do not see it says nothing."""
        return self.lease.is_held() and self._registered_on == self.lease.id

    def standing(self) -> int | None:
        """A number that changes when others may have taken us for dead in between; None: they may do so now."""
        return self._num_writings if self.is_seen() else None

    async def is_confirmed(self, limit_s: float) -> bool:
        """Whether etcd still has our record as that of a living process. Raises `EtcdUnavailable`: it did not answer in
        time."""
        found = None if self._record is None else await self._client.get(self._members + self._record.name, limit_s)
        member = None if found is None else _decode_member(found)
        return member is not None and member.state != GONE and member == self._record

    # ------------------------------------------------------------ writing

    async def register(self, record: MemberRecord) -> None:
        """Announces this process, in the place of an older incarnation if there is one.

        Raises `msgspec.ValidationError` for a record that others would refuse, and `EtcdUnavailable`.
        """
        self._record = _validated(record)
        for pause_s in backoff_s():
            # a lease that lapsed while a model was loaded, say, is about to be replaced by its keeper
            with contextlib.suppress(EtcdLeaseNotFound):
                await self._reconcile()
            if self._registered_on:
                return
            await asyncio.sleep(pause_s)

    async def publish_pipeline(self, record: PipelineRecord, guard: Compare) -> int | None:
        """Publishes a pipeline if `guard` (the leader's) holds and what was published last is still of `record.epoch`
        (0: nothing was). Returns its new epoch; None: not the leader, or not up to date.

        Raises `EtcdUnavailable`: it may be published all the same, the watch will tell.
        """
        key, value = self._pipelines + record.pipeline, msgspec.json.encode(msgspec.structs.replace(record, epoch=0))
        seen = has_mod_revision(key, record.epoch) if record.epoch else is_absent(key)
        result = await self._client.transaction([guard, seen], [Put(key, value)])
        return result.revision if result.succeeded else None

    async def pipelines(self) -> dict[str, PipelineRecord]:
        """The latest publications, by name. Raises `EtcdUnavailable`."""
        items, _ = await self._client.get_prefix(self._pipelines)
        records = [record for item in items if (record := _decode_pipeline(item)) is not None]
        return {record.pipeline: record for record in records}

    async def evict(self, record: MemberRecord) -> None:
        """Ends the lease of an incarnation that must be taken for dead. Raises `EtcdUnavailable`."""
        found = await self._client.get(self._members + record.name)
        member = None if found is None else _decode_member(found)
        if found is None or member is None or member.incarnation != record.incarnation:
            return
        await end_member(self._client, found, member)

    async def _leave(self) -> None:
        """Best effort: without etcd the lease lapses by itself."""
        with contextlib.suppress(EtcdError, TimeoutError):
            async with asyncio.timeout(LEAVE_LIMIT_S):
                found = None if self._record is None else await self._client.get(self._members + self._record.name)
                if found is not None and self._record is not None and found.lease_id == self.lease.id:
                    await _say_gone(self._client, found, self._record)
                await self.lease.revoke()

    async def _reconcile(self) -> None:
        """Makes etcd hold our record, on our lease. Raises `MemberSuperseded`."""
        async with self._writing:
            while self._record is not None and self.lease.id:
                key, value = self._members + self._record.name, msgspec.json.encode(self._record)
                found = await self._client.get(key)
                if found is not None and (found.value, found.lease_id) == (value, self.lease.id):
                    self._registered_on = found.lease_id
                    return
                self._check_not_superseded(found)
                seen = is_absent(key) if found is None else has_mod_revision(key, found.mod_revision)
                self._num_writings += 1
                await self._client.transaction([seen], [Put(key, value, self.lease.id)])

    def _check_not_superseded(self, found: KeyValue | None) -> None:
        # before its first registration a process is the newest incarnation there is
        other = None if found is None or not self._registered_on else _decode_member(found)
        if other is not None and self._record is not None and other.incarnation != self._record.incarnation:
            raise MemberSuperseded(f"{other.name} is now incarnation {other.incarnation} (pid {other.pid})")

    # ------------------------------------------------------------ watching

    async def watch(self) -> AsyncGenerator[MemberEvent, None]:
        """The members there are as `MemberJoined`, `SnapshotEnd`, then changes. Ends only by `aclose()`."""
        roster = Roster()
        is_first = True
        async with contextlib.aclosing(follow(self._client, self._members)) as changes:
            upcoming = asyncio.ensure_future(anext(changes))
            try:
                while True:
                    wait_s = self.lease.settled_at_s() - time.monotonic() if roster.missing else None
                    await asyncio.wait([upcoming], timeout=wait_s)
                    is_settled = self.lease.settled_at_s() <= time.monotonic()
                    events = roster.settle() if is_settled else []
                    if upcoming.done():
                        events += self._take(roster, upcoming.result(), is_settled)
                        upcoming = asyncio.ensure_future(anext(changes))
                    for event in events:
                        yield event
                    if is_first:
                        yield SnapshotEnd()
                        is_first = False
            finally:
                upcoming.cancel()
                await asyncio.wait([upcoming])

    def _take(self, roster: Roster, change: Snapshot | WatchEvent, is_settled: bool) -> list[MemberEvent]:
        if isinstance(change, Snapshot):
            records = [_decode_member(item) for item in change.items]
            return roster.replace([record for record in records if record is not None], is_settled)
        if change.kind == "delete":
            return roster.delete(change.key.removeprefix(self._members), is_settled)
        record = _decode_member(change)
        return [] if record is None else roster.put(record)

    async def watch_pipelines(self) -> AsyncGenerator[PipelineRecord, None]:
        """The latest publication of every pipeline, then every new one. Ends only by `aclose()`. What is there already
        comes newest first: what an older publication says of a successor may be over."""
        epochs: dict[str, int] = {}
        async with contextlib.aclosing(follow(self._client, self._pipelines)) as changes:
            async for change in changes:
                items: Sequence[KeyValue | WatchEvent] = change.items if isinstance(change, Snapshot) else (change,)
                for item in sorted(items, key=lambda item: item.mod_revision, reverse=True):
                    is_gone = isinstance(item, WatchEvent) and item.kind == "delete"
                    record = None if is_gone else _decode_pipeline(item)
                    if record is not None and record.epoch > epochs.get(record.pipeline, 0):
                        epochs[record.pipeline] = record.epoch
                        yield record


def member_key(cluster: str, name: str) -> str:
    """Where a member's record is kept."""
    return f"/dejavu/{cluster}/members/{name}"


async def end_member(client: EtcdClient, item: KeyValue, record: MemberRecord) -> None:
    """Tells everybody that an incarnation is gone, whose record `item` holds, and ends its lease. Raises
    `EtcdUnavailable`: nobody may have been told, or all."""
    with contextlib.suppress(EtcdLeaseNotFound):
        await _say_gone(client, item, record)
        await client.revoke_lease(item.lease_id)


async def _say_gone(client: EtcdClient, item: KeyValue, record: MemberRecord) -> None:
    value = msgspec.json.encode(msgspec.structs.replace(record, state=GONE))
    await client.transaction([has_mod_revision(item.key, item.mod_revision)], [Put(item.key, value, item.lease_id)])


def _validated(record: MemberRecord) -> MemberRecord:
    return msgspec.json.decode(msgspec.json.encode(record), type=MemberRecord)


def _decode_member(item: KeyValue | WatchEvent) -> MemberRecord | None:
    record = decode_value(item.key, item.value, MemberRecord)
    return record if record is not None and item.key.endswith(f"/{record.name}") else None


def _decode_pipeline(item: KeyValue | WatchEvent) -> PipelineRecord | None:
    record = decode_value(item.key, item.value, PipelineRecord)
    if record is None or not item.key.endswith(f"/{record.pipeline}"):
        return None
    return msgspec.structs.replace(record, epoch=item.mod_revision)
