"""The way into a token stage's pool, and who is kept out of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from common.handoff_messages import FencedOff, FenceOff
from common.kv.errors import LinkLost
from common.kv.server import PoolServer
from common.membership import MemberRecord
from common.process import has_ended

logger = logging.getLogger(__name__)

FENCE_LIMIT_S = 5.0


class Door:
    """Fences off what belongs to older epochs. `on_stuck()` is called where that cannot be done for those of our own
    pipeline."""

    def __init__(self, server: PoolServer, stage_index: int, on_stuck: Callable[[], None]) -> None:
        self.offer = server.offer.encode()
        self._server = server
        self._stage_index = stage_index
        self._on_stuck = on_stuck
        self._fencing: set[tuple[int, str, int]] = set()
        """what drivers, by their epoch, asked for and has not been done yet"""

    async def begin_epoch(self, pipeline: str, epoch: int) -> None:
        """Returns when nobody can write under an older epoch of our pipeline. Who cannot be kept from it may write
        anywhere, as the driver of that epoch, who knew where, is perhaps gone: then there is no way but another process
        with another pool."""
        try:
            async with asyncio.timeout(FENCE_LIMIT_S):
                await self._server.fence({pipeline: epoch})
        except TimeoutError:
            logger.error("somebody who does not end may still write to our pool: another process is to take over")
            self._on_stuck()

    async def fence_off(self, fence: FenceOff, tell: Callable[[FencedOff], None]) -> None:
        """Does what a driver asks for, and tells it when it is done. It may repeat itself meanwhile."""
        asked = {(fence.epoch, *each) for each in fence.oldest.items()} - self._fencing
        if not asked:
            return
        oldest = {name: epoch for _, name, epoch in asked}
        self._fencing |= asked
        try:
            await self._server.fence(oldest)
        finally:
            self._fencing -= asked
        tell(FencedOff(fence.epoch, self._stage_index, oldest))

    async def writer_lost(self, writer: MemberRecord) -> None:
        """A prompt stage is gone. What it had begun is over once its process is, which can be seen here where it ran on
        this machine; returns then."""
        if await has_ended(writer.machine, writer.pid):
            with contextlib.suppress(LinkLost):  # we end, too
                await self._server.bury(writer.incarnation)

    def stats(self) -> dict[str, object]:
        """Who reaches our pool at present, and over which links, for `status`."""
        peers = self._server.peers
        return {"peers": peers, "link": ",".join(sorted(set(peers.values())))}

    async def aclose(self) -> None:
        await self._server.aclose()
