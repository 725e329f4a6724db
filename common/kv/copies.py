"""Carries copy plans out between byte arrays of host memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.kv.geometry import FEW_PIECES, CopyPlan, Int64
from common.kv.native import BIG_COPY_BYTES, load_native
from common.kv.pool import Bytes

_MIN_DIRECT_BYTES = 4096
"""From here on a copy per piece is cheaper than gathering and scattering many at once."""
_BATCH_BYTES = 256 << 10
"""So much is gathered before it is scattered: it stays in the processor's cache in between."""


Pieces = list[tuple[int, int, int]]
"""(where in the source, where in the destination, bytes) of a few pieces"""


def copy_pieces(plan: CopyPlan, source: Bytes, destination: Bytes) -> None:
    """Copies all pieces, many or big ones without the interpreter lock. Raises `ValueError`, and has touched nothing,
    where one would leave its memory."""
    pieces = _few(plan)
    if pieces is not None and sum(num_bytes for _, _, num_bytes in pieces) < BIG_COPY_BYTES:
        _check_few(pieces, len(source), len(destination))
        for start, to, num_bytes in pieces:
            destination[to : to + num_bytes] = source[start : start + num_bytes]
        return
    native = load_native()
    if native is not None:
        native.copy(source, plan.source_offset, destination, plan.destination_offset, plan.num_bytes)
    else:
        check_plan(plan, len(source), len(destination))
        _copy_by_numpy(plan, source, destination)


def _copy_by_numpy(plan: CopyPlan, source: Bytes, destination: Bytes) -> None:
    for num_bytes in np.unique(plan.num_bytes).tolist():
        same_size = plan.num_bytes == num_bytes
        from_offsets, to_offsets = plan.source_offset[same_size], plan.destination_offset[same_size]
        if num_bytes >= _MIN_DIRECT_BYTES or len(from_offsets) < FEW_PIECES:
            for start, to in zip(from_offsets.tolist(), to_offsets.tolist(), strict=True):
                destination[to : to + num_bytes] = source[start : start + num_bytes]
        else:
            _copy_small(num_bytes, source, from_offsets, destination, to_offsets)


def check_pieces(offsets: Int64, num_bytes: Int64, total_bytes: int) -> None:
    """Raises `ValueError` where a piece would lie outside of a pool of `total_bytes`."""
    ends = offsets + num_bytes
    # each part alone as well, since a sum of hostile numbers may wrap around
    for numbers in (offsets, num_bytes, ends):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= total_bytes:
            raise ValueError(f"pieces do not lie within a pool of {total_bytes} bytes")


def check_plan(plan: CopyPlan, source_bytes: int, destination_bytes: int) -> None:
    """Raises `ValueError` where a piece would lie outside of its pool, on either side."""
    pieces = _few(plan)
    if pieces is not None:
        _check_few(pieces, source_bytes, destination_bytes)
    else:
        check_pieces(plan.source_offset, plan.num_bytes, source_bytes)
        check_pieces(plan.destination_offset, plan.num_bytes, destination_bytes)


def _check_few(pieces: Pieces, source_bytes: int, destination_bytes: int) -> None:
    for start, to, num_bytes in pieces:
        if num_bytes < 0 or not 0 <= start <= source_bytes - num_bytes or not 0 <= to <= destination_bytes - num_bytes:
            raise ValueError(f"pieces do not lie within pools of {source_bytes} and {destination_bytes} bytes")


def gather(source: Bytes, offsets: Int64, num_bytes: Int64) -> Bytes:
    """Pieces of `source`, one after the other."""
    gathered = np.empty(num_bytes.sum(), dtype=np.uint8)
    copy_pieces(CopyPlan(offsets, packed(num_bytes), num_bytes), source, gathered)
    return gathered


def scatter(payload: Bytes, offsets: Int64, num_bytes: Int64, destination: Bytes) -> None:
    """The inverse of `gather`: pieces that lie one after the other in `payload` go to `offsets`."""
    copy_pieces(CopyPlan(packed(num_bytes), offsets, num_bytes), payload, destination)


def split(plan: CopyPlan, max_bytes: int) -> Iterator[CopyPlan]:
    """The plan in parts of at most `max_bytes`; pieces that are bigger are cut."""
    num_cuts = -(-plan.num_bytes // max_bytes)
    within = (np.arange(num_cuts.sum()) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)) * max_bytes
    source = np.repeat(plan.source_offset, num_cuts) + within
    destination = np.repeat(plan.destination_offset, num_cuts) + within
    sizes = np.minimum(np.repeat(plan.num_bytes, num_cuts) - within, max_bytes)
    ends = np.cumsum(sizes)
    first, sent = 0, 0
    while first < len(sizes):
        end = int(np.searchsorted(ends, sent + max_bytes, side="right"))
        yield CopyPlan(source[first:end], destination[first:end], sizes[first:end])
        first, sent = end, int(ends[end - 1])


def packed(num_bytes: Int64) -> Int64:
    """Offsets of pieces that lie one after the other."""
    return np.cumsum(num_bytes) - num_bytes


def _few(plan: CopyPlan) -> Pieces | None:
    """The pieces as plain numbers; None: too many for that to be fast."""
    if len(plan.num_bytes) >= FEW_PIECES:
        return None
    starts, places, sizes = plan.source_offset.tolist(), plan.destination_offset.tolist(), plan.num_bytes.tolist()
    return list(zip(starts, places, sizes, strict=True))


def _copy_small(num_bytes: int, source: Bytes, from_offsets: Int64, destination: Bytes, to_offsets: Int64) -> None:
    pieces, from_index = _as_pieces(source, from_offsets, num_bytes)
    places, to_index = _as_pieces(destination, to_offsets, num_bytes)
    step = max(1, _BATCH_BYTES // num_bytes)
    for first in range(0, len(from_offsets), step):
        places[to_index[first : first + step]] = pieces[from_index[first : first + step]]


def _as_pieces(
    memory: Bytes, offsets: Int64, num_bytes: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.void]], Int64]:
    """`memory` as overlapping elements of `num_bytes`, and the element at each offset."""
    unit = int(np.gcd.reduce(offsets)) or num_bytes
    count = (len(memory) - num_bytes) // unit + 1
    return np.ndarray((count,), f"V{num_bytes}", memory, 0, (unit,)), offsets // unit
