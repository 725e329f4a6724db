"""Which token pipelines have the sequences of a router that has died (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from common.messages import Orphans

MAX_HOMES = 65_536
MAX_REPORT_S = 1.0
"""So long a new leader waits to hear which sequences of its predecessor token pipelines have."""


class Inheritance:
    """What token pipelines have said of that, and from which of them the leader after that router has yet to hear."""

    def __init__(self) -> None:
        self._homes: dict[str, str] = {}
        """token pipelines of the sequences, by replica key"""
        self._reports: dict[str, str] = {}
        """the router whose sequences each token pipeline has last reported"""
        self.awaited: frozenset[str] = frozenset()
        """token pipelines that may have sequences and have not said which"""

    def reported(self, orphans: Orphans) -> None:
        """The oldest sequences that nobody has asked for are forgotten."""
        self._homes.update(dict.fromkeys(orphans.keys, orphans.pipeline))
        for key in list(self._homes)[: max(0, len(self._homes) - MAX_HOMES)]:
            del self._homes[key]
        self._reports[orphans.pipeline] = orphans.router

    def await_from(self, pipelines: Iterable[str], router: str) -> None:
        """We lead after `router`: those of `pipelines` that have not said what they have of it are waited for."""
        self.awaited = frozenset(pipeline for pipeline in pipelines if self._reports.get(pipeline) != router)

    def await_less(self, pipelines: Collection[str]) -> bool:
        """These are waited for no longer; True: they were the last."""
        before, self.awaited = self.awaited, self.awaited.difference(pipelines)
        return bool(before) and not self.awaited

    def home(self, key: str) -> str:
        """The token pipeline that has the sequence; '' where none has said so."""
        return self._homes.get(key, "")

    def placed(self, key: str) -> None:
        """From now on it is ours."""
        self._homes.pop(key, None)
