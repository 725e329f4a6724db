"""Connections to other services by member name, replaced when a member comes back as another incarnation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, MutableMapping
from typing import TypeVar

import msgspec

from common.channel import Outbox
from common.messages import Beat, Message, encode

logger = logging.getLogger(__name__)

BEAT_S = 0.1
Heard = TypeVar("Heard")


class Peers:
    """Sends messages to members; `identity` is what receivers see as the sender's routing id."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._outboxes: dict[str, Outbox] = {}
        self._connecting = asyncio.Lock()

    async def connect(self, name: str, endpoint: str) -> None:
        """Connects to a member, or keeps the connection if it has this endpoint already."""
        async with self._connecting:  # a second connection would take the first one's place, and its messages along
            known = self._outboxes.get(name)
            if known is not None and known.endpoint == endpoint:
                return
            outbox = await Outbox.connect(endpoint, self._identity)
            if known is not None:
                self.drop(name, known.endpoint)
            self._outboxes[name] = outbox

    def send(self, name: str, message: Message, payload: bytes | memoryview | None = None) -> bool:
        """Queues a message; False where the member is not known (it is gone, or not seen yet)."""
        known = self._outboxes.get(name)
        if known is None:
            logger.debug("no connection to %s for %s", name, type(message).__name__)
            return False
        if payload is None:
            known.send(encode(message))
        else:
            known.send(encode(message), payload)
        return True

    def drop(self, name: str, endpoint: str) -> None:
        """Closes the connection to a member that was at `endpoint`. One to its successor stays: who is told of a
        pipeline before he is told of its members has connected already."""
        known = self._outboxes.get(name)
        if known is not None and known.endpoint == endpoint:
            del self._outboxes[name]
            known.close()

    def close(self) -> None:
        for outbox in self._outboxes.values():
            outbox.close()
        self._outboxes.clear()


def understood(
    decode: Callable[[memoryview], Heard], peer: bytes, frames: list[memoryview], counters: MutableMapping[str, int]
) -> Heard | None:
    """What another process has said; None, and counted as one of `bad_frames`, where that is no message."""
    try:
        return decode(frames[0])
    except (msgspec.DecodeError, IndexError) as error:
        counters["bad_frames"] += 1
        logger.warning("malformed message from %r: %s", peer[:64], error)
        return None


async def beat(
    peers: Peers, routers: Callable[[], Iterable[str]], name: str, incarnation: str, overdue_s: Callable[[], float]
) -> None:
    """Tells every router that this event loop turns, until cancelled."""
    while True:
        message = Beat(name, incarnation, overdue_s())
        for router in routers():
            peers.send(router, message)
        await asyncio.sleep(BEAT_S)
