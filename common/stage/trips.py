"""Whether a step was lost between the stages of a pipeline (pure; times are handed in).

A connection that breaks loses what was on its way, though both its ends live: nobody is stuck then, and one step never
comes out. Steps come out in the order in which they went in.
"""

from __future__ import annotations

from common.stage.step_clock import FACTOR, FIRST_LIMIT_S, STANDSTILL_S

OVERTAKEN_LIMIT_S = 1.0


class Trips:
    """The steps of one epoch that are on their way through the stages, as its driver sees them. None that has taken
    less than `min_limit_s` is lost."""

    def __init__(self, min_limit_s: float) -> None:
        self._min_limit_s = min_limit_s
        self._started: dict[int, tuple[float, int]] = {}
        self._longest_s = 0.0
        self._most_tokens = 0
        self._asked_s: float | None = None
        self._stood_still_s = 0.0
        self._last_out = -1

    def started(self, step: int, num_tokens: int, now_s: float) -> None:
        self._started[step] = (now_s - self._stood_still_s, num_tokens)

    def done(self, step: int, now_s: float) -> None:
        """It came out of the last stage."""
        self._last_out = max(self._last_out, step)
        started_s, num_tokens = self._started.pop(step, (now_s - self._stood_still_s, 0))
        self._longest_s = max(self._longest_s, now_s - self._stood_still_s - started_s)
        self._most_tokens = max(self._most_tokens, num_tokens)

    def overdue_s(self, now_s: float) -> float:
        """By how much the oldest step exceeds the minimum, or 5 x what others let expect, or 1 s where a later one has
        come out; 0: it does not. Asked many times a second; a gap between two questions is time in which this process
        stood still."""
        gap_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        self._asked_s = now_s
        if gap_s > STANDSTILL_S:
            self._stood_still_s += gap_s
        if not self._started:
            return 0.0
        step, (started_s, num_tokens) = next(iter(self._started.items()))
        limit_s = OVERTAKEN_LIMIT_S if step < self._last_out else self._limit_s(num_tokens)
        return max(0.0, now_s - self._stood_still_s - started_s - limit_s)

    def _limit_s(self, num_tokens: int) -> float:
        if not self._most_tokens:
            return FIRST_LIMIT_S
        return max(self._min_limit_s, FACTOR * self._longest_s * max(1.0, num_tokens / self._most_tokens))
