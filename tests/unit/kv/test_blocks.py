from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.kv.blocks import BlockAllocator
from common.kv.intervals import IntervalSet

NUM_BLOCKS = 48
OWNERS = st.integers(0, 7)
COUNTS = st.integers(1, 20)


class AllocatorMachine(RuleBasedStateMachine):
    """Against a model that knows nothing but sets."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.held: dict[int, list[int]] = {}
        self.quarantined: dict[int, set[int]] = {}

    @property
    def num_free(self) -> int:
        gone = sum(map(len, self.held.values())) + sum(map(len, self.quarantined.values()))
        return NUM_BLOCKS - gone

    def take(self, blocks: list[int] | None, count: int) -> list[int]:
        if count > self.num_free:
            assert blocks is None
            return []
        assert blocks is not None and len(blocks) == len(set(blocks)) == count
        taken = {*sum(self.held.values(), []), *set().union(*self.quarantined.values())}
        assert not taken & set(blocks) and min(blocks) >= 0 and max(blocks) < NUM_BLOCKS
        return blocks

    @rule(owner=OWNERS, count=COUNTS, growth=st.integers(-3, 20))
    def allocate(self, owner: int, count: int, growth: int) -> None:
        if owner in self.held:
            with pytest.raises(ValueError, match="holds blocks already"):
                self.allocator.allocate(owner, count, count + growth)
        elif blocks := self.take(self.allocator.allocate(owner, count, count + growth), count):
            self.held[owner] = blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(0, 9))
    def extend(self, data: st.DataObject, count: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        blocks = self.allocator.extend(owner, count)
        if count == 0:
            assert blocks == []
        else:
            self.held[owner] = self.held[owner] + self.take(blocks, count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.allocator.release(owner)
        del self.held[owner]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.allocator.quarantine(owner, owner)
        self.quarantined.setdefault(owner, set()).update(self.held.pop(owner))

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def release_quarantine(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.quarantined)))
        self.allocator.release_quarantine(owner)
        del self.quarantined[owner]

    @invariant()
    def books_balance(self) -> None:
        self.allocator.check()
        assert self.allocator.num_free == self.num_free
        assert self.allocator.num_quarantined == sum(map(len, self.quarantined.values()))


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def is_one_run(blocks: list[int]) -> bool:
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_sequences_that_grow_in_turn_stay_in_one_piece() -> None:
    allocator = BlockAllocator(1000)
    tables = {owner: allocator.allocate(owner, 3, 20) or [] for owner in range(40)}
    for _ in range(17):
        for owner in tables:
            tables[owner] += allocator.extend(owner, 1) or []
    assert all(len(table) == 20 and is_one_run(table) for table in tables.values())


def test_a_sequence_that_outgrows_its_headroom_goes_on_beside_it() -> None:
    allocator = BlockAllocator(100)
    table = allocator.allocate("a", 2, 4) or []
    table += allocator.extend("a", 50) or []
    assert table == list(range(52))


def test_headroom_of_others_is_used_only_when_there_is_no_other_place() -> None:
    allocator = BlockAllocator(100)
    assert allocator.allocate("a", 10, 60) == list(range(10))
    assert allocator.allocate("b", 20, 20) == list(range(60, 80))
    assert allocator.allocate("c", 30, 30) == list(range(30, 60))  # the far end of a's headroom
    assert allocator.extend("a", 20) == list(range(10, 30))
    assert allocator.extend("a", 1) == [80]
    allocator.check()


def test_pieces_are_used_when_no_run_is_left() -> None:
    allocator = BlockAllocator(8)
    for owner in range(8):
        allocator.allocate(owner, 1, 1)
    for owner in (1, 3, 4, 6):
        allocator.release(owner)
    assert allocator.allocate("late", 4, 4) == [3, 4, 1, 6]
    assert allocator.allocate("later", 1, 1) is None


def test_quarantined_blocks_are_given_to_nobody() -> None:
    allocator = BlockAllocator(10)
    allocator.allocate("a", 6, 10)
    allocator.quarantine("a", "somebody")
    assert allocator.quarantines == ["somebody"]
    assert (allocator.num_free, allocator.num_quarantined) == (4, 6)
    assert allocator.allocate("a", 5, 5) is None
    assert allocator.allocate("a", 4, 4) == [6, 7, 8, 9]
    allocator.release_quarantine("somebody")
    assert allocator.extend("a", 6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyError):
        allocator.release_quarantine("somebody")


def test_check_names_the_numbers() -> None:
    allocator = BlockAllocator(10)
    allocator._free.remove(2, 4)
    with pytest.raises(AssertionError, match="add up to 10.*'free': 8"):
        allocator.check()


def test_interval_set_joins_neighbours_and_splits() -> None:
    intervals = IntervalSet()
    for start, end in [(0, 2), (4, 6), (2, 4), (9, 12)]:
        intervals.add(start, end)
    assert list(intervals) == [(0, 6), (9, 12)]
    intervals.remove(2, 3)
    intervals.remove(9, 10)
    assert list(intervals) == [(0, 2), (3, 6), (10, 12)]
    assert intervals.size == 7
    assert intervals.end_of(3) == 6 and intervals.end_of(2) == 2 and intervals.end_of(11) == 12
    assert intervals.best_fit(2) == (0, 2) and intervals.best_fit(3) == (3, 6) and intervals.best_fit(4) is None
