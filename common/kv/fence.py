"""Which writers a pool still lets in (pure).

A writer says under which *authority* it writes: epochs, by who gave them out. Once an epoch is over, whatever was
opened under it has to end before blocks that were granted in it may be given away, and nobody is let in under it again.
"""

from __future__ import annotations

from collections.abc import Mapping

Authority = Mapping[str, int]
"""The epoch of each that a writer depends on; empty: it only reads."""


class Fence:
    """The oldest epochs under which a pool may be written to. They never fall."""

    def __init__(self, oldest: Authority | None = None) -> None:
        self._oldest: dict[str, int] = dict(oldest or {})

    def raise_to(self, oldest: Authority) -> None:
        """Nobody writes any more under an older epoch than these."""
        for name, epoch in oldest.items():
            self._oldest[name] = max(epoch, self._oldest.get(name, 0))

    def stops(self, authority: Authority) -> bool:
        """Whether a writer of this authority has to go."""
        return any(epoch < self._oldest.get(name, 0) for name, epoch in authority.items())
