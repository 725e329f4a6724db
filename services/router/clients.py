"""Client connections: who said hello and who still lives. A client that vanished ends its requests; one that was only
stopped asks for them again."""

from __future__ import annotations

from collections.abc import Iterable

from dejavu.errors import ProtocolError
from dejavu.wire import PROTOCOL_VERSION

SILENCE_LIMIT_S = 5.0
RETURN_S = 1.0
"""So long the requests of a client whose connection is gone wait for its next one."""
MAX_CLIENTS = 4096
MAX_GIVEN_UP = 4096


class Clients:
    """When each client, by routing id, was last heard (pure; the caller gives the time)."""

    def __init__(self) -> None:
        self._heard_s: dict[bytes, float] = {}
        self._given_up: dict[bytes, None] = {}
        """the last whose requests were ended while nothing was heard of them"""
        self._versions: dict[bytes, int] = {}
        """protocol versions of clients that are there and speak another one"""

    def heard(self, client: bytes, now_s: float) -> bool:
        """Notes a sign of life; False where there are too many clients for a new one."""
        if client not in self._heard_s and len(self._heard_s) >= MAX_CLIENTS:
            return False
        self._heard_s[client] = now_s
        return True

    def greeted(self, client: bytes, version: int) -> None:
        """Which version of the protocol a client that is heard speaks."""
        self._versions.pop(client, None)
        if version != PROTOCOL_VERSION:
            self._versions[client] = version

    def refusal(self, client: bytes) -> ProtocolError | None:
        """Why nothing can be done for a client that speaks another version; None: it speaks ours."""
        version = self._versions.get(client)
        if version is None:
            return None
        return ProtocolError(f"this client speaks protocol {version}, the router protocol {PROTOCOL_VERSION}")

    def __contains__(self, client: bytes) -> bool:
        return client in self._heard_s

    def gone(self, client: bytes, *, had_requests: bool = False) -> bool:
        """Nothing can be sent to it, or it is silent; False: that is known already."""
        was_there = self._heard_s.pop(client, None) is not None
        self._versions.pop(client, None)
        if had_requests:
            self._given_up[client] = None
        if len(self._given_up) > MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        return was_there

    def is_back(self, client: bytes) -> bool:
        """Whether one that is heard now was given up; True once."""
        return self._given_up.pop(client, False) is None

    def silent(self, now_s: float) -> Iterable[bytes]:
        """Clients that have not been heard for `SILENCE_LIMIT_S`."""
        return [client for client, heard_s in self._heard_s.items() if now_s - heard_s > SILENCE_LIMIT_S]
