"""Which writers can no longer reach any pool of a token pipeline, as its driver knows it (pure).

A writer that lives through the end of its epoch (stopped, cut off, never killed) may still write to blocks that it was
granted. The driver has every stage fence the old epoch off, and gives such blocks away only when all have answered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

Need = frozenset[tuple[str, int]]
"""What must be fenced off before blocks are safe: (name, oldest epoch that may remain)."""


class Fences:
    """Of one driver at one epoch. `ask` for a fence, send what `take_asked` gives to all stages, note the answers."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._asked: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._confirmed: defaultdict[str, dict[int, int]] = defaultdict(dict)
        """how far each stage has fenced each name off"""

    def ask(self, oldest: Mapping[str, int]) -> None:
        """Nobody is to write under older epochs than these. What was asked for before is not asked again."""
        for name, epoch in oldest.items():
            if epoch > self._asked.get(name, 0):
                self._asked[name] = self._unsent[name] = epoch

    def take_asked(self) -> dict[str, int]:
        """What the stages have not been asked for yet."""
        unsent, self._unsent = self._unsent, {}
        return unsent

    def unanswered(self, stage_index: int) -> dict[str, int]:
        """What this stage was asked for and has not said that it has done."""
        sent = {name: epoch for name, epoch in self._asked.items() if name not in self._unsent}
        return {name: epoch for name, epoch in sent.items() if self._confirmed[name].get(stage_index, 0) < epoch}

    def confirm(self, stage_index: int, oldest: Mapping[str, int]) -> None:
        """A stage's answer: nothing of older epochs changes its pool any more."""
        for name, epoch in oldest.items():
            stages = self._confirmed[name]
            stages[stage_index] = max(epoch, stages.get(stage_index, 0))

    def holds(self, need: Need) -> bool:
        """Whether all of it is fenced off at all stages."""
        return all(self._is_confirmed(name, epoch) for name, epoch in need)

    def _is_confirmed(self, name: str, epoch: int) -> bool:
        stages = self._confirmed.get(name, {})
        return len(stages) == self._num_stages and min(stages.values()) >= epoch
