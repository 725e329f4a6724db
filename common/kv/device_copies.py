"""Carries copy plans out between tensors of any devices, in few operations however many pieces there are."""

from __future__ import annotations

import numpy as np
import torch

from common.kv.copies import copy_pieces
from common.kv.geometry import CopyPlan, Int64
from common.kv.pool import KvPool

_MIN_DIRECT_BYTES = 256 << 10
"""From here on a copy per piece is cheaper than gathering and scattering many at once."""
_MAX_GATHERED_BYTES = 64 << 20


def copy_between(plan: CopyPlan, source: KvPool, destination: KvPool, host_seen: torch.Tensor | None = None) -> None:
    """Copies between pools of any devices; on a GPU by the current stream, which is not waited for. `host_seen` is the
    host's pool as the GPU sees it."""
    if source.is_host and destination.is_host:
        copy_pieces(plan, source.memory, destination.memory)
        return
    copy_on_device(
        plan,
        source.arena,
        destination.arena,
        source_seen=host_seen if source.is_host else None,
        destination_seen=host_seen if destination.is_host else None,
    )


def copy_on_device(
    plan: CopyPlan,
    source: torch.Tensor,
    destination: torch.Tensor,
    *,
    source_seen: torch.Tensor | None = None,
    destination_seen: torch.Tensor | None = None,
) -> None:
    """Gives all copies to the current stream; all tensors are uint8 [num_bytes] of one dimension. Where a side is
    page-locked host memory, `..._seen` is the same memory as the GPU sees it: many small pieces are gathered and
    scattered by the GPU then, through it."""
    for num_bytes in np.unique(plan.num_bytes).tolist():
        same_size = plan.num_bytes == num_bytes
        from_offsets, to_offsets = plan.source_offset[same_size], plan.destination_offset[same_size]
        if num_bytes >= _MIN_DIRECT_BYTES or len(from_offsets) < 4:
            for start, to in zip(from_offsets.tolist(), to_offsets.tolist(), strict=True):
                destination[to : to + num_bytes].copy_(source[start : start + num_bytes], non_blocking=True)
            continue
        step = max(1, _MAX_GATHERED_BYTES // num_bytes)
        gathers = source if source_seen is None else source_seen
        scatters = destination if destination_seen is None else destination_seen
        for first in range(0, len(from_offsets), step):
            part = slice(first, first + step)
            _copy_equal(num_bytes, gathers, from_offsets[part], scatters, to_offsets[part])


def _copy_equal(
    num_bytes: int, source: torch.Tensor, from_offsets: Int64, destination: torch.Tensor, to_offsets: Int64
) -> None:
    """Pieces of one size, as rows as wide as sizes and offsets allow."""
    unit = int(np.gcd.reduce([num_bytes, int(np.gcd.reduce(from_offsets)), int(np.gcd.reduce(to_offsets))]))
    rows_per_piece = np.arange(num_bytes // unit)
    from_rows, to_rows = (
        torch.from_numpy((offsets[:, None] // unit + rows_per_piece).ravel()) for offsets in (from_offsets, to_offsets)
    )
    gathered = _rows(source, unit).index_select(0, from_rows.to(source.device))
    _rows(destination, unit).index_copy_(0, to_rows.to(destination.device), gathered.to(destination.device))


def _rows(memory: torch.Tensor, unit: int) -> torch.Tensor:
    """`memory`, less what does not make a row, as [row][element]."""
    whole = memory[: len(memory) // unit * unit]
    widest = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if unit % dtype.itemsize == 0)
    return whole.view(widest).view(-1, unit // widest.itemsize)
