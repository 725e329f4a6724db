"""Who reads a stage's pool, when the pool is to be given up."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class Guests:
    """Waits until all have said that they are out, or have died: they would read whatever comes to lie there."""

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self._changed = asyncio.Event()

    def left(self, name: str) -> None:
        """One is out."""
        self._inside.discard(name)
        self._changed.set()

    async def gone(self, names: Collection[str]) -> None:
        """Returns when all of these, who are inside now, have left."""
        self._inside.update(names)
        while self._inside:
            self._changed.clear()
            await self._changed.wait()
