"""Who holds which block of a pool.

Attention reads a sequence in place where its blocks are one ascending run, and a copy of it is a single
piece. So a sequence is placed where it can grow to its expected length, and that *headroom* behind it stays
reserved softly: others get it only when there is no other room in one piece for them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from common.kv.intervals import IntervalSet

Run = tuple[int, int]
"""Blocks [start, end)."""


@dataclass(slots=True)
class _Holding:
    """The runs of one owner in the order of its block table; blocks up to `headroom_end` behind the last are
    its headroom."""

    runs: list[Run] = field(default_factory=list)
    headroom_end: int = 0

    @property
    def end(self) -> int:
        return self.runs[-1][1]

    @property
    def num_headroom(self) -> int:
        return self.headroom_end - self.end

    @property
    def num_blocks(self) -> int:
        return sum(end - start for start, end in self.runs)

    def append(self, start: int, end: int, headroom_end: int) -> None:
        self.headroom_end = headroom_end
        if self.runs and self.runs[-1][1] == start:
            self.runs[-1] = (self.runs[-1][0], end)
        else:
            self.runs.append((start, end))


class BlockAllocator:
    """Blocks 0..num_blocks-1, each free, held by one owner, or quarantined. Costs grow with the number of
    owners, not of blocks. Not thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = IntervalSet()
        self._free.add(0, num_blocks)
        self._holdings: dict[Hashable, _Holding] = {}
        self._quarantined: dict[Hashable, list[Run]] = {}
        self._num_headroom = 0
        self._num_quarantined = 0

    @property
    def num_free(self) -> int:
        """Blocks that an `allocate` or `extend` could get, headroom of others included."""
        return self._free.size + self._num_headroom

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    def figures(self) -> dict[str, int]:
        """Blocks in all, those that could be had and those withdrawn, as `status` shows them."""
        return {"total": self.num_blocks, "free": self.num_free, "quarantined": self.num_quarantined}

    def allocate(self, owner: Hashable, count: int, expected_total: int) -> list[int] | None:
        """`count` >= 1 blocks for an owner that holds none, which expects to grow to `expected_total`; None:
        there are not so many. Raises `ValueError` for an owner that holds blocks already."""
        if owner in self._holdings:
            raise ValueError(f"{owner!r} holds blocks already")
        if count < 1:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > self.num_free:
            return None
        holding = self._holdings[owner] = _Holding()
        return self._place(holding, count, max(count, expected_total))

    def extend(self, owner: Hashable, count: int) -> list[int] | None:
        """`count` more blocks, the next adjacent ones if they are free; None: there are not so many (nothing
        changes then). Raises `KeyError` for an owner that holds none."""
        holding = self._holdings[owner]
        if count > self.num_free:
            return None
        start = holding.end
        taken = min(count, holding.num_headroom)
        self._num_headroom -= taken
        beside = 0
        if taken < count and start + taken == holding.headroom_end:
            beside = min(count - taken, self._free.end_of(start + taken) - start - taken)
            self._free.remove(start + taken, start + taken + beside)
        taken += beside
        if taken:
            holding.append(start, start + taken, max(holding.headroom_end, start + taken))
        blocks = list(range(start, start + taken))
        missing = count - taken
        if missing:
            # nothing is known about its growth any more; doubling keeps the number of runs logarithmic
            blocks += self._place(holding, missing, missing + holding.num_blocks)
        return blocks

    def release(self, owner: Hashable) -> None:
        """Frees all blocks of `owner`. Raises `KeyError` if it holds none."""
        for start, end in self._withdraw(owner):
            self._free.add(start, end)

    @property
    def quarantines(self) -> list[Hashable]:
        """The reasons there are for keeping blocks from everybody."""
        return list(self._quarantined)

    def quarantine(self, owner: Hashable, reason: Hashable) -> None:
        """Takes `owner`'s blocks away from it and gives them to nobody until `release_quarantine(reason)`: somebody
        who cannot be stopped for certain may still write to them. Raises `KeyError` if it holds none."""
        runs = self._withdraw(owner)
        self._num_quarantined += sum(end - start for start, end in runs)
        self._quarantined.setdefault(reason, []).extend(runs)

    def release_quarantine(self, reason: Hashable) -> None:
        """Frees what was quarantined for this reason. Raises `KeyError` if nothing was."""
        for start, end in self._quarantined.pop(reason):
            self._num_quarantined -= end - start
            self._free.add(start, end)

    def check(self) -> None:
        """Balances the books: every block is in exactly one place. Raises `AssertionError` with the
        numbers."""
        held = [run for holding in self._holdings.values() for run in holding.runs]
        headroom = [(each.end, each.headroom_end) for each in self._holdings.values() if each.end < each.headroom_end]
        quarantined = [run for runs in self._quarantined.values() for run in runs]
        kinds = {"free": list(self._free), "headroom": headroom, "held": held, "quarantined": quarantined}
        sizes = {kind: sum([end - start for start, end in runs]) for kind, runs in kinds.items()}
        everything = sorted([*kinds["free"], *headroom, *held, *quarantined])
        # each begins where the one before it ends
        is_whole = [0, *[end for _, end in everything]] == [*[start for start, _ in everything], self.num_blocks]
        counted = (self._free.size, self._num_headroom, self._num_quarantined)
        if not is_whole or counted != (sizes["free"], sizes["headroom"], sizes["quarantined"]):
            raise AssertionError(f"blocks do not add up to {self.num_blocks}: {sizes}, counted {counted}, {everything}")

    # ------------------------------------------------------------ placing

    def _place(self, holding: _Holding, count: int, expected: int) -> list[int]:
        """Adds `count` blocks as a new run with headroom up to `expected`; the caller knows that they
        exist."""
        run = self._free.best_fit(expected) or self._run_of(count) or self._cut_headroom(count)
        if run is None:
            return self._collect(holding, count)
        start, end = run[0], min(run[1], run[0] + expected)
        self._free.remove(start, end)
        holding.append(start, start + count, end)
        self._num_headroom += end - start - count
        return list(range(start, start + count))

    def _run_of(self, count: int) -> Run | None:
        run = self._free.largest()
        return run if run is not None and run[1] - run[0] >= count else None

    def _cut_headroom(self, count: int) -> Run | None:
        """Makes free the far half, or `count` if that is more, of the largest headroom that has `count`
        blocks."""
        donor = self._largest_donor()
        if donor is None or donor.num_headroom < count:
            return None
        end = donor.headroom_end
        start = end - max(count, donor.num_headroom // 2)
        self._free_headroom(donor, start)
        # what was free behind it has joined it
        return start, self._free.end_of(start)

    def _collect(self, holding: _Holding, count: int) -> list[int]:
        """`count` blocks out of whatever there is, longest pieces first."""
        blocks: list[int] = []
        while len(blocks) < count:
            missing = count - len(blocks)
            run = self._free.largest() or self._cut_headroom(1)
            if run is None:
                raise AssertionError(f"{missing} blocks counted as free cannot be found")
            start, end = run[0], min(run[1], run[0] + missing)
            self._free.remove(start, end)
            holding.append(start, end, end)
            blocks += range(start, end)
        return blocks

    def _largest_donor(self) -> _Holding | None:
        donors = (holding for holding in self._holdings.values() if holding.runs)
        return max(donors, key=lambda holding: holding.num_headroom, default=None)

    def _free_headroom(self, holding: _Holding, start: int) -> None:
        self._free.add(start, holding.headroom_end)
        self._num_headroom -= holding.headroom_end - start
        holding.headroom_end = start

    def _withdraw(self, owner: Hashable) -> list[Run]:
        holding = self._holdings[owner]
        self._free_headroom(holding, holding.end)
        del self._holdings[owner]
        return holding.runs
