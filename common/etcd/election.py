"""One leader per cluster: whoever wrote the leader key, for as long as the writer's lease lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

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
from common.etcd.errors import EtcdLeaseNotFound, EtcdUnavailable
from common.etcd.follow import Snapshot, follow
from common.etcd.lease import Lease
from common.etcd.values import decode_value

logger = logging.getLogger(__name__)

NEVER = -1
"""no key ever has this revision"""


class Candidate(msgspec.Struct, frozen=True):
    """The value of the leader key."""

    name: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class LeaderChanged:
    """Somebody leads now; with nobody leading, the name is '' and the revision 0.

    `fencing_revision` rises with every leader; `is_me` is true for this very incarnation only.
    """

    name: str
    endpoint: str
    fencing_revision: int
    is_me: bool


NOBODY = LeaderChanged("", "", 0, False)


class Election:
    """Run `campaign()` as a task; `watch()` tells who leads; `guard()` goes into all a leader writes."""

    def __init__(self, client: EtcdClient, cluster: str, lease: Lease, candidate: str, endpoint: str) -> None:
        self._client = client
        self._key = f"/dejavu/{cluster}/leader"
        self._lease = lease
        self._candidate = Candidate(candidate, endpoint)
        self._fencing_revision = NEVER

    def guard(self) -> Compare:
        """Holds while this process leads. Never holds for one that does not lead, or was deposed since."""
        return has_mod_revision(self._key, self._fencing_revision)

    async def campaign(self) -> None:
        """Takes the lead whenever it is free, until cancelled. Outlives outages."""
        is_new = True
        async with aclosing(self._holders()) as holders:
            async for holder in holders:
                leader = self._leader_of(holder)
                # A namesake is our own previous incarnation, dead or about to be told so: no need to wait for
                # its lease to lapse. Only a new process may think so, else two would depose each other.
                is_ours_to_take = is_new and leader.name == self._candidate.name and not leader.is_me
                if leader == NOBODY or is_ours_to_take:
                    await self._claim(holder)
                is_new = False

    async def watch(self) -> AsyncGenerator[LeaderChanged, None]:
        """Every change of leader, beginning with the one there is (if any). Ends only by `aclose()`."""
        last = NOBODY
        async with aclosing(self._holders()) as holders:
            async for holder in holders:
                leader = self._leader_of(holder)
                if leader != last:
                    yield leader
                last = leader

    async def _holders(self) -> AsyncGenerator[KeyValue | WatchEvent | None, None]:
        """What the leader key holds (None: nothing), now and after every change."""
        async with aclosing(follow(self._client, self._key)) as changes:
            async for change in changes:
                match change:
                    case Snapshot(items):
                        yield next((item for item in items if item.key == self._key), None)
                    case WatchEvent(key=key) if key == self._key:
                        yield change if change.kind == "put" else None

    def _leader_of(self, holder: KeyValue | WatchEvent | None) -> LeaderChanged:
        value = None if holder is None else decode_value(self._key, holder.value, Candidate)
        if holder is None or value is None:
            return NOBODY
        is_me = value == self._candidate and holder.lease_id == self._lease.id != 0
        # never taken back: when somebody else leads, the old revision fails by itself
        if is_me:
            self._fencing_revision = max(self._fencing_revision, holder.mod_revision)
        return LeaderChanged(value.name, value.endpoint, holder.mod_revision, is_me)

    async def _claim(self, holder: KeyValue | WatchEvent | None) -> None:
        """Writes the key if it still is as seen. Whether that worked, the watch will tell."""
        seen = is_absent(self._key) if holder is None else has_mod_revision(self._key, holder.mod_revision)
        value = msgspec.json.encode(self._candidate)
        for pause_s in backoff_s():
            try:
                if self._lease.id:
                    await self._client.transaction([seen], [Put(self._key, value, self._lease.id)])
                    return
            except (EtcdUnavailable, EtcdLeaseNotFound) as error:
                logger.info("cannot campaign yet: %s", error)
            await asyncio.sleep(pause_s)
