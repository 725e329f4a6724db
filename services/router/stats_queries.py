"""How a router learns what the services say of themselves, for `status`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from common.messages import StatsQuery, StatsReply

STATS_WAIT_S = 0.5


class StatsQueries:
    """Asks services for their figures. `send` takes a service's name and a message for it."""

    def __init__(self, own_name: str, send: Callable[[str, StatsQuery], object]) -> None:
        self._own_name = own_name
        self._send = send
        self._rounds: dict[int, StatsRound] = {}
        self._num_rounds = 0

    async def ask(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What those say who answer in time."""
        self._num_rounds += 1
        number = self._num_rounds
        asked = self._rounds[number] = StatsRound(set(names))
        for name in list(asked.missing):
            self._send(name, StatsQuery(number, self._own_name))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATS_WAIT_S):
                await asked.complete.wait()
        del self._rounds[number]
        return asked.replies

    def answered(self, reply: StatsReply) -> None:
        """An answer has come; too late perhaps."""
        if reply.query_id in self._rounds:
            self._rounds[reply.query_id].add(reply.name, msgspec.msgpack.decode(reply.stats))


class StatsRound:
    """The answers to one query; `complete` is set when all that were asked have answered."""

    def __init__(self, asked: set[str]) -> None:
        self.replies: dict[str, dict[str, Any]] = {}
        self.missing = asked
        self.complete = asyncio.Event()
        if not asked:
            self.complete.set()

    def add(self, name: str, stats: dict[str, Any]) -> None:
        """The answer of one service."""
        self.missing.discard(name)
        self.replies[name] = stats
        if not self.missing:
            self.complete.set()
