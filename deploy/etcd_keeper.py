"""Keeps a private etcd alive: the same data, the same port."""

from __future__ import annotations

import asyncio
import logging

from deploy.children import watch_exit
from deploy.etcd_server import EtcdNotStarted, EtcdServer

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


async def keep_etcd(etcd: EtcdServer) -> None:
    """Starts a running etcd again whenever it ends, until cancelled. Never gives up: serving goes on without it."""
    pause_s = FIRST_PAUSE_S
    while True:
        code = etcd.process.poll()
        if code is None:
            code = await watch_exit(etcd.process.pid, etcd.process.wait)
        logger.warning("etcd ended with %d; starting it again", code)
        etcd.spawn()
        try:
            await asyncio.to_thread(etcd.wait_healthy)
            pause_s = FIRST_PAUSE_S
        except EtcdNotStarted as error:
            logger.error("%s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
