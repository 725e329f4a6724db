"""List, then watch, and list again where needed: an up-to-date view of a prefix that never ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from common.etcd.client import EtcdClient, KeyValue, WatchEvent, backoff_s
from common.etcd.errors import EtcdCompacted, EtcdUnavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys as of one revision; what an earlier snapshot had and this one lacks is gone."""

    items: tuple[KeyValue, ...]


async def follow(client: EtcdClient, prefix: str) -> AsyncGenerator[Snapshot | WatchEvent, None]:
    """A snapshot, then changes; another snapshot where etcd forgot those in between. Outlives outages."""
    pauses = backoff_s()
    while True:
        try:
            items, revision = await client.get_prefix(prefix)
            pauses = backoff_s()
            yield Snapshot(tuple(items))
            async with aclosing(client.watch_prefix(prefix, revision + 1)) as events:
                async for event in events:
                    yield event
        except EtcdUnavailable as error:
            logger.warning("%s", error)
            await asyncio.sleep(next(pauses))
        except EtcdCompacted as error:
            logger.info("listing %s again: %s", prefix, error)
