"""The copies and digests in C, beside numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from common.kv.checksum import _digest_by_numpy, word_factors
from common.kv.copies import _copy_by_numpy
from common.kv.geometry import CopyPlan
from common.kv.native import BIG_COPY_BYTES, Native, load_native

DRAWS = np.random.default_rng(0)


@pytest.fixture
def native() -> Native:
    loaded = load_native()
    if loaded is None:
        pytest.skip("no C compiler")
    return loaded


def random_pieces(total_bytes: int, max_bytes: int, count: int) -> CopyPlan:
    """Of any sizes, at any places; on the destination's side they do not overlap."""
    sizes = DRAWS.integers(0, max_bytes, count)
    gaps = DRAWS.integers(0, 100, count)
    destination = np.cumsum(sizes + gaps) - sizes
    return CopyPlan(DRAWS.integers(0, total_bytes - max_bytes, count), destination, sizes)


@pytest.mark.parametrize(("max_bytes", "count"), [(70, 300), (5000, 300), (100_000, 300), (3_000_000, 8)])
def test_copies_are_those_of_numpy(native: Native, max_bytes: int, count: int) -> None:
    plan = random_pieces(16 << 20, max_bytes, count)
    assert (plan.total_bytes >= BIG_COPY_BYTES) == (max_bytes >= 100_000)
    source = DRAWS.integers(0, 256, 16 << 20, dtype=np.uint8)
    size = int(plan.destination_offset[-1] + plan.num_bytes[-1])
    ours, theirs = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    native.copy(source, plan.source_offset, ours, plan.destination_offset, plan.num_bytes)
    _copy_by_numpy(plan, source, theirs)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("start", "to", "size"), [(-1, 0, 8), (0, -1, 8), (93, 0, 8), (0, 93, 8), (0, 0, -8), (1 << 62, 0, 1 << 62)]
)
def test_a_copy_that_would_leave_its_memory_touches_nothing(native: Native, start: int, to: int, size: int) -> None:
    source, destination = np.ones(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    with pytest.raises(ValueError, match="do not lie within"):
        native.copy(source, np.array([0, start]), destination, np.array([0, to]), np.array([8, size]))
    assert not destination.any()


def test_what_is_read_only_stays_as_it_is(native: Native) -> None:
    destination = np.frombuffer(bytes(8), dtype=np.uint8)
    one = np.array([0])
    with pytest.raises(ValueError, match="read-only"):
        native.copy(np.ones(8, dtype=np.uint8), one, destination, one, one + 8)
    with pytest.raises(ValueError, match="gaps"):
        native.copy(np.ones(16, dtype=np.uint8)[::2], one, np.zeros(8, dtype=np.uint8), one, one + 8)


@pytest.mark.parametrize("width", [1, 15, 16, 64, 256, 259])
def test_digests_are_those_of_numpy(native: Native, width: int) -> None:
    words = DRAWS.integers(0, 1 << 63, (6, 40, width + 3), dtype=np.uint64)
    slots = DRAWS.permutation(40)[:25]
    expected = _digest_by_numpy(words, (1, 5), slots, slice(2, 2 + width), word_factors(width))
    assert np.array_equal(native.digest(words, (1, 5), slots, (2, 2 + width), word_factors(width)), expected)
    for planes, bad, columns in (
        ((1, 7), 0, (0, 1)),
        ((0, 1), 40, (0, 1)),
        ((0, 1), -1, (0, 1)),
        ((0, 1), 0, (3, 999)),
    ):
        with pytest.raises(ValueError, match="do not lie within"):
            native.digest(words, planes, np.array([0, bad]), columns, word_factors(width))
