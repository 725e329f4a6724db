"""Who reads a stage's pool, when the pool is to be given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

from common.messages import REPEAT_S


class Guests:
    """Waits until all have said that they are out, or have died: they would read whatever comes to lie there."""

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self._changed = asyncio.Event()

    def left(self, name: str) -> None:
        """One is out."""
        self._inside.discard(name)
        self._changed.set()

    async def gone(self, names: Collection[str], ask: Callable[[str], object]) -> None:
        """Asks all of these, who are inside now, to leave. Returns when they have; until then they are asked again, as
        they, or we, may not have heard."""
        self._inside.update(names)
        while self._inside:
            for name in sorted(self._inside):
                ask(name)
            await self._wait()

    async def _wait(self) -> None:
        """Until all have left, or for so long that they are asked again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPEAT_S):
                while self._inside:
                    self._changed.clear()
                    await self._changed.wait()
