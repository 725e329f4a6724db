"""Who is told about a sequence: the router that asked for it, or the one that took it over (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Admit
from common.stage.role import Sender


@dataclass(frozen=True, slots=True)
class Listener:
    """The router a sequence came from, which calls it `admit.sequence_id`."""

    admit: Admit
    router: Sender


class Audience:
    """The listener of each sequence. A sequence that another router took over has two names: the one it was admitted
    under, which stages and stores know, and the one that its present router uses."""

    def __init__(self) -> None:
        self._listeners: dict[str, Listener] = {}
        self._taken_over: dict[str, str] = {}
        """our name, by the present router's"""

    def enter(self, sequence_id: str, admit: Admit, router: Sender) -> None:
        """From now on this router hears of the sequence, and no other."""
        self.leave(sequence_id)
        self._listeners[sequence_id] = Listener(admit, router)
        if admit.sequence_id != sequence_id:
            self._taken_over[admit.sequence_id] = sequence_id

    def leave(self, sequence_id: str) -> None:
        """Nobody needs to hear of it any more. Unknown ones are ignored."""
        listener = self._listeners.pop(sequence_id, None)
        if listener is not None:
            self._taken_over.pop(listener.admit.sequence_id, None)

    def of(self, sequence_id: str) -> Listener | None:
        return self._listeners.get(sequence_id)

    def called(self, name: str) -> str | None:
        """The sequence that a router calls so; None for one that it no longer has."""
        sequence_id = self._taken_over.get(name, name)
        listener = self._listeners.get(sequence_id)
        return sequence_id if listener is not None and listener.admit.sequence_id == name else None

    def of_router(self, router: Sender) -> list[str]:
        """The sequences that this router hears of."""
        return [sequence_id for sequence_id, listener in self._listeners.items() if listener.router == router]
