"""How a thread is kept from memory that its caller has taken back."""

from __future__ import annotations

import threading
from types import TracebackType


class GivenUp(Exception):
    """Nobody waits for this call any more."""


class Gate:
    """A call touches memory of its caller only inside `with gate`, which raises `GivenUp` once it is shut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_shut = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self.is_shut:
            self._lock.release()
            raise GivenUp

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def shut(self) -> None:
        """Returns when nobody is inside, and nobody will be."""
        with self._lock:
            self.is_shut = True
