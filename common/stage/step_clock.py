"""Whether the step that is being computed takes suspiciously long (pure; times are handed in).

They are best read from a clock that stands still while others use the processors (`ComputeThread.clock_s`): else a
busy machine makes long steps, and after long steps a stuck one is noticed late.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

MIN_LIMIT_S = 1.0
FIRST_LIMIT_S = 60.0
"""Until a step has been seen nobody knows how long one takes here."""
FACTOR = 5.0
STANDSTILL_S = 0.5
NUM_RECENT = 256


class StepClock:
    """Knows how long recent steps took, and which steps are waiting for the compute thread."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=NUM_RECENT)
        self._waiting: deque[int] = deque()
        self._started_s = 0.0
        self._asked_s: float | None = None
        self._is_excused = False

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """The compute thread waits for somebody else, who has a deadline of his own: that is no step which is stuck."""
        self._is_excused = True
        try:
            yield
        finally:
            self._is_excused = False

    def submitted(self, num_tokens: int, now_s: float) -> None:
        """A step was queued; the thread works on the oldest."""
        if not self._waiting:
            self._started_s = now_s
        self._waiting.append(num_tokens)

    def done(self, now_s: float) -> None:
        """The oldest step is over."""
        self._recent.append((now_s - self._started_s, self._waiting.popleft()))
        self._started_s = now_s

    def overdue_s(self, now_s: float) -> float:
        """By how much the running step exceeds max(1 s, 5 x what recent steps let expect); 0: it does not. Asked many
        times a second; a gap between two questions is time in which the whole process stood still."""
        gap_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        self._asked_s = now_s
        if gap_s > STANDSTILL_S or self._is_excused:
            self._started_s = min(now_s, self._started_s + gap_s)
        if not self._waiting:
            return 0.0
        return max(0.0, now_s - self._started_s - self._limit_s(self._waiting[0]))

    def _limit_s(self, num_tokens: int) -> float:
        if not self._recent:
            return FIRST_LIMIT_S
        longest_s = max(duration_s for duration_s, _ in self._recent)
        most_tokens = max(count for _, count in self._recent)
        scale = max(1.0, num_tokens / max(1, most_tokens))
        return max(MIN_LIMIT_S, FACTOR * longest_s * scale)
