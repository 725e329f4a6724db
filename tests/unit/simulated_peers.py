"""Connections of a simulated process: whom it knows, and where."""

from __future__ import annotations

from common.peers import Peers


class KnownPeers(Peers):
    """What is sent is for the world to deliver, by `send`, to those that are among `_known` (name: endpoint)."""

    def __init__(self, identity: str) -> None:
        super().__init__(identity)
        self._known: dict[str, str] = {}

    async def connect(self, name: str, endpoint: str) -> None:
        self._known[name] = endpoint

    def drop(self, name: str, endpoint: str) -> None:
        if self._known.get(name) == endpoint:
            del self._known[name]
