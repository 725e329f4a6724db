"""Requests that came while nobody led: they wait for the next leader, who may be this router (pure)."""

from __future__ import annotations

from dejavu.wire import Submit

HOLD_S = 1.0
"""A client that has waited for so long is told that there is no leader."""
MAX_HELD = 4096


class Held:
    """Submissions by client and request id."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[bytes, str], Submit] = {}

    def add(self, client: bytes, submit: Submit) -> bool:
        """False: there are too many."""
        if len(self._waiting) >= MAX_HELD:
            return False
        self._waiting[client, submit.request_id] = submit
        return True

    def take(self, client: bytes, request_id: str) -> Submit | None:
        """The request, which waits no longer; None: it does not wait."""
        return self._waiting.pop((client, request_id), None)

    def take_all(self) -> list[tuple[bytes, Submit]]:
        """All of them, in the order in which they came."""
        taken = [(client, submit) for (client, _), submit in self._waiting.items()]
        self._waiting.clear()
        return taken
