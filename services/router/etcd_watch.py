"""Whether etcd answers, for `status`: while it does not, membership stays as it was and nobody is replaced."""

from __future__ import annotations

import asyncio
import time

from common.etcd.client import EtcdClient
from common.etcd.errors import EtcdUnavailable
from services.router.status import Journal

ETCD = "etcd"
"""How it is called among the services in `events`."""
PAUSE_S = 0.1
LIMIT_S = 0.7
MAX_LATE_S = 0.2


async def watch_etcd(client: EtcdClient, journal: Journal) -> None:
    """Notes "detected" when etcd has not answered for `LIMIT_S`, "restored" when it answers again. Runs until
    cancelled."""
    is_away = False
    while True:
        started_s = time.monotonic()
        try:
            await client.get("/", LIMIT_S)
            if is_away:
                journal.note("restored", ETCD)
            is_away = False
        except EtcdUnavailable as error:
            # an answer that lies there while we are kept from running is none that is missing
            was_late = time.monotonic() - started_s > LIMIT_S + MAX_LATE_S
            if not is_away and not was_late:
                journal.note("detected", ETCD, reason=str(error))
                is_away = True
        await asyncio.sleep(PAUSE_S)
