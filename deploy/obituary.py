"""Tells the others at once that a process has died: its record says so and its lease is revoked by who saw it end.

A lease that lapses by itself takes seconds. The supervisor knows in milliseconds, and for certain: it is the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from common.etcd.client import EtcdClient, backoff_s
from common.etcd.errors import EtcdRequestFailed, EtcdUnavailable
from common.etcd.values import decode_value
from common.membership import MemberRecord, end_member, member_key
from common.process import is_of_process

logger = logging.getLogger(__name__)


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

    def report(self, incarnation: str) -> None:
        """The process that began as this incarnation has ended, whatever its role and its name were by then."""
        task = asyncio.get_running_loop().create_task(self._revoke(incarnation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _revoke(self, incarnation: str) -> None:
        """Again and again until etcd has heard it, or no member is that process."""
        for pause_s in backoff_s():
            with contextlib.suppress(EtcdUnavailable):
                await self._revoke_once(incarnation)
                return
            await asyncio.sleep(pause_s)

    async def _revoke_once(self, incarnation: str) -> None:
        found, _ = await self._client.get_prefix(member_key(self._cluster, ""))
        for item in found:
            record = decode_value(item.key, item.value, MemberRecord)
            if record is not None and is_of_process(record.incarnation, incarnation):
                try:
                    await end_member(self._client, item, record)
                except EtcdRequestFailed as error:
                    logger.warning("the lease of %s lapses by itself: %s", record.name, error)
