"""Keeps a private etcd alive: the same data, the same port."""

from __future__ import annotations

import asyncio
import logging
import signal

from deploy.children import watch_exit
from deploy.etcd_server import EtcdNotStarted, EtcdServer

logger = logging.getLogger(__name__)

PATIENCE = 60
"""So many questions in a row must go unanswered, a minute and a half, before an etcd that lives is ended: serving goes
on without it, and it may come back by itself."""
ASK_AGAIN_S = 0.5
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


async def keep_etcd(etcd: EtcdServer) -> None:
    """Starts a running etcd again whenever it ends, or stands still, until cancelled. Never gives up: serving goes on
    without it."""
    pause_s = FIRST_PAUSE_S
    while True:
        code = etcd.process.poll()
        if code is None:
            code = await _end_of(etcd)
        logger.warning("etcd ended with %d; starting it again", code)
        etcd.spawn()
        try:
            await asyncio.to_thread(etcd.wait_healthy)
            pause_s = FIRST_PAUSE_S
        except EtcdNotStarted as error:
            logger.error("%s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


async def _end_of(etcd: EtcdServer) -> int:
    """The exit code. One that has been stopped for long, or hangs, is ended: nobody could be replaced meanwhile."""
    exited = watch_exit(etcd.process.pid, etcd.process.wait)
    num_unanswered = 0
    while not exited.done():
        is_healthy = await asyncio.to_thread(etcd.is_healthy)
        num_unanswered = 0 if is_healthy else num_unanswered + 1
        if num_unanswered >= PATIENCE and not exited.done():
            logger.error("etcd stands still")
            etcd.process.send_signal(signal.SIGKILL)
        await asyncio.wait([exited], timeout=ASK_AGAIN_S)
    return exited.result()
