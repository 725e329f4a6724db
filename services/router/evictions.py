"""Ends the leases of those that were taken for dead, while whoever judges goes on: etcd may be away for long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from common.etcd.client import backoff_s
from common.etcd.errors import EtcdUnavailable
from common.membership import MemberRecord, Membership

logger = logging.getLogger(__name__)


class Evictions:
    """At most one is under way for every incarnation, until its record is gone. Run it with `run`."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._under_way: set[str] = set()
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Carries them out until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.get_running_loop().create_future()

    def __contains__(self, record: MemberRecord) -> bool:
        return record.incarnation in self._under_way

    def begin(self, record: MemberRecord, is_wanted: Callable[[], bool]) -> None:
        """Has everybody told that this incarnation is gone, as soon as etcd allows, if `is_wanted()` still says so."""
        if record not in self:
            self._under_way.add(record.incarnation)
            self._tasks.create_task(self._carry_out(record, is_wanted))

    async def _carry_out(self, record: MemberRecord, is_wanted: Callable[[], bool]) -> None:
        try:
            for pause_s in backoff_s():
                if await self._try(record):
                    return
                await asyncio.sleep(pause_s)
                if not is_wanted():
                    logger.info("%s stays for now: it lives, or others lead", record.name)
                    return
        finally:
            self._under_way.discard(record.incarnation)

    async def _try(self, record: MemberRecord) -> bool:
        try:
            await self._membership.evict(record)
        except EtcdUnavailable as error:
            logger.warning("%s keeps its lease for now: %s", record.name, error)
            return False
        return True
