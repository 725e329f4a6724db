"""A set of integers kept as sorted, disjoint, never touching intervals [start, end)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator


class IntervalSet:
    """Cost grows with the number of intervals, not with what they contain."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.size = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Adds [start, end), which must not overlap the set; neighbours become one interval."""
        if start >= end:
            return
        at = bisect_right(self._starts, start)
        joins_left = at > 0 and self._ends[at - 1] == start
        joins_right = at < len(self._starts) and self._starts[at] == end
        self.size += end - start
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends.pop(at)
            self._starts.pop(at)
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)

    def remove(self, start: int, end: int) -> None:
        """Takes [start, end) out; it must lie within one interval."""
        if start >= end:
            return
        at = bisect_right(self._starts, start) - 1
        first, last = self._starts[at], self._ends[at]
        self.size -= end - start
        self._starts[at : at + 1] = [] if first == start else [first]
        self._ends[at : at + 1] = [] if first == start else [start]
        if end < last:
            self._starts.insert(at + (first < start), end)
            self._ends.insert(at + (first < start), last)

    def end_of(self, start: int) -> int:
        """The end of the interval that contains `start`; `start` itself where none does."""
        at = bisect_right(self._starts, start) - 1
        return max(start, self._ends[at]) if at >= 0 else start

    def best_fit(self, count: int) -> tuple[int, int] | None:
        """The smallest interval of at least `count`, the lowest of equals; None: there is none."""
        fitting = ((end - start, start) for start, end in self if end - start >= count)
        found = min(fitting, default=None)
        return None if found is None else (found[1], found[1] + found[0])

    def largest(self) -> tuple[int, int] | None:
        """The longest interval; None: the set is empty."""
        return max(self, key=lambda interval: interval[1] - interval[0], default=None)
