"""Tells the others at once that a process has died: its lease is revoked by who saw it end.

A lease that lapses by itself takes seconds. The supervisor knows in milliseconds, and for certain: it is the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from common.etcd.client import EtcdClient, backoff_s
from common.etcd.errors import EtcdError, EtcdLeaseNotFound, EtcdUnavailable
from common.etcd.values import decode_value
from common.membership import MemberRecord, member_key

logger = logging.getLogger(__name__)

REVOKE_DEADLINE_S = 1.0


class Obituaries:
    """Use as `async with Obituaries(etcd_url, cluster) as obituaries`; `report` at any time."""

    def __init__(self, etcd_url: str, cluster: str) -> None:
        self._client = EtcdClient(etcd_url)
        self._cluster = cluster
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Obituaries:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.__aexit__(*exception)

    def report(self, name: str, incarnation: str) -> None:
        """The process that was this incarnation of member `name` has ended."""
        task = asyncio.get_running_loop().create_task(self._revoke(name, incarnation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _revoke(self, name: str, incarnation: str) -> None:
        """Again and again until etcd has heard it, or another incarnation has the name."""
        for pause_s in backoff_s():
            with contextlib.suppress(EtcdUnavailable):
                await self._revoke_once(name, incarnation)
                return
            await asyncio.sleep(pause_s)

    async def _revoke_once(self, name: str, incarnation: str) -> None:
        key = member_key(self._cluster, name)
        found = await self._client.get(key)
        record = None if found is None else decode_value(key, found.value, MemberRecord)
        if found is None or record is None or record.incarnation != incarnation:
            return
        try:
            await self._client.revoke_lease(found.lease_id, REVOKE_DEADLINE_S)
        except EtcdLeaseNotFound:
            pass
        except EtcdError as error:
            logger.warning("the lease of %s lapses by itself: %s", name, error)
