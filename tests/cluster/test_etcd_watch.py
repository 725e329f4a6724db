"""That etcd is away, and back, shows within a second."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from common.etcd.client import EtcdClient
from deploy.etcd_server import EtcdServer
from services.router.etcd_watch import watch_etcd
from services.router.status import Journal
from tests.cluster.etcd_fixtures import own_etcd

__all__ = ["own_etcd"]


async def noted(journal: Journal, count: int) -> dict[str, Any]:
    async with asyncio.timeout(15):
        while len(journal.events) < count:  # noqa: ASYNC110 - the journal tells nobody
            await asyncio.sleep(0.01)
    return journal.events[-1]


async def test_an_outage_is_noted_once_with_its_end(own_etcd: EtcdServer) -> None:
    journal = Journal()
    async with EtcdClient(own_etcd.url) as client:
        watching = asyncio.create_task(watch_etcd(client, journal))
        for number in (1, 3):
            await client.get("/")
            stopped_s = time.monotonic()
            os.kill(own_etcd.process.pid, signal.SIGSTOP)
            gone = await noted(journal, number)
            assert (gone["kind"], gone["service"]) == ("detected", "etcd")
            assert gone["at_monotonic_s"] - stopped_s < 1.5
            os.kill(own_etcd.process.pid, signal.SIGCONT)
            back = await noted(journal, number + 1)
            assert (back["kind"], back["service"]) == ("restored", "etcd")
        watching.cancel()
