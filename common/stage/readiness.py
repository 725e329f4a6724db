"""Which stages of a pipeline have said that they run an epoch (pure)."""

from __future__ import annotations

from collections import defaultdict

from common.messages import StageReady


class Readiness:
    """Kept by the driver. A follower may see a new epoch before the driver does: its report waits."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._reports: dict[int, dict[int, StageReady]] = defaultdict(dict)

    def add(self, ready: StageReady) -> None:
        """A stage's report; the last one of a stage and epoch counts."""
        self._reports[ready.epoch][ready.stage_index] = ready

    def all_of(self, epoch: int) -> list[StageReady] | None:
        """The reports of all stages; None while one is missing. Older epochs are forgotten."""
        for old in [known for known in self._reports if known < epoch]:
            del self._reports[old]
        reports = self._reports.get(epoch, {})
        return list(reports.values()) if len(reports) == self._num_stages else None

    def forget(self, epoch: int) -> None:
        """What was said of this epoch and of older ones; others may know of a newer one already."""
        for old in [known for known in self._reports if known <= epoch]:
            del self._reports[old]
