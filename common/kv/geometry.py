"""Which bytes go where when two stages cut the same model differently. Pure, and without a Python loop per
token or layer.

A span = (token range, layer range, head range) of a sequence. Its canonical order is [layer][key |
value][token][head], whatever the pools on both sides look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.kv.layout import PoolLayout

Int64 = npt.NDArray[np.int64]
FEW_PIECES = 8
"""Below this plain numbers are faster than arrays."""
Range = tuple[int, int]
"""[start, end)"""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Copy `num_bytes[i]` from `source_offset[i]` to `destination_offset[i]`, for all i; in canonical
    order."""

    source_offset: Int64
    destination_offset: Int64
    num_bytes: Int64

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def total_bytes(self) -> int:
        return sum(self.num_bytes.tolist()) if len(self) < FEW_PIECES else int(self.num_bytes.sum())


def plan_copies(
    source: PoolLayout,
    source_blocks: Sequence[int],
    destination: PoolLayout,
    destination_blocks: Sequence[int],
    token_range: Range,
    layer_range: Range,
    head_range: Range | None = None,
) -> CopyPlan:
    """The fewest contiguous copies that bring a span from one pool into another.

    Block tables start at the sequence's token 0. Layers and heads are counted from the model's first;
    `head_range` defaults to the heads that both pools have. Raises `ValueError` where a pool or a block table
    does not hold the span, or the pools hold different things.
    """
    if source.head_bytes != destination.head_bytes or source.dtype != destination.dtype:
        raise ValueError(f"a head is {source.head_bytes} bytes here, {destination.head_bytes} there")
    heads = head_range or _intersection(source.heads, destination.heads)
    from_slots = span_slots(source, source_blocks, token_range, layer_range, heads)
    to_slots = span_slots(destination, destination_blocks, token_range, layer_range, heads)
    return plan_slots(source, from_slots, destination, to_slots, layer_range, heads)


def plan_slots(
    source: PoolLayout,
    from_slots: Int64,
    destination: PoolLayout,
    to_slots: Int64,
    layer_range: Range,
    heads: Range,
) -> CopyPlan:
    """Like `plan_copies` for tokens of any number of sequences, whose slots are known."""
    num_bytes = (heads[1] - heads[0]) * source.head_bytes
    pieces = CopyPlan(
        from_slots * source.slot_bytes + (heads[0] - source.first_head) * source.head_bytes,
        to_slots * destination.slot_bytes + (heads[0] - destination.first_head) * source.head_bytes,
        np.full(len(from_slots), num_bytes),
    )
    pieces = _merge(pieces)
    from_planes = _plane_offsets(source, layer_range)
    planes = CopyPlan(
        np.add.outer(from_planes, pieces.source_offset).ravel(),
        np.add.outer(_plane_offsets(destination, layer_range), pieces.destination_offset).ravel(),
        np.tile(pieces.num_bytes, len(from_planes)),
    )
    return _merge(planes)


def route(stages: Sequence[Range], layer_range: Range) -> list[tuple[int, Range]]:
    """Which of the pipeline's `stages` (their layers, ascending) owns which part of `layer_range`. Raises
    `ValueError` where a layer has no owner."""
    parts = [(index, _intersection(stage, layer_range)) for index, stage in enumerate(stages)]
    owned = [(index, part) for index, part in parts if part[0] < part[1]]
    bounds = [layer_range[0], *(part[1] for _, part in owned)]
    if [part[0] for _, part in owned] != bounds[:-1] or bounds[-1] != layer_range[1]:
        raise ValueError(f"stages {list(stages)} do not own each of the layers {layer_range} once")
    return owned


def span_slots(
    layout: PoolLayout, blocks: Sequence[int], token_range: Range, layer_range: Range, head_range: Range
) -> Int64:
    """The slot of each token of a span. Raises `ValueError` where the pool or the block table does not hold
    it."""
    _check_within(layer_range, layout.layers, "layers")
    _check_within(head_range, layout.heads, "heads")
    _check_within(token_range, (0, len(blocks) * layout.block_size), "tokens")
    first_block = token_range[0] // layout.block_size
    end_block = -(-token_range[1] // layout.block_size)
    table = np.asarray(blocks[first_block:end_block], dtype=np.int64)
    if table.min() < 0 or table.max() >= layout.num_blocks:
        raise ValueError(f"block ids {table.min()}..{table.max()} in a pool of {layout.num_blocks}")
    positions = np.arange(*token_range) - first_block * layout.block_size
    slots: Int64 = table[positions // layout.block_size] * layout.block_size + positions % layout.block_size
    return slots


def _plane_offsets(layout: PoolLayout, layer_range: Range) -> Int64:
    return np.arange(*layout.planes(layer_range)) * layout.plane_bytes


def _merge(plan: CopyPlan) -> CopyPlan:
    """Joins neighbours that are adjacent on both sides."""
    source, destination, sizes = plan.source_offset, plan.destination_offset, plan.num_bytes
    apart = (source[1:] != source[:-1] + sizes[:-1]) | (destination[1:] != destination[:-1] + sizes[:-1])
    if apart.all():
        return plan
    firsts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    return CopyPlan(source[firsts], destination[firsts], np.add.reduceat(sizes, firsts))


def _intersection(one: Range, other: Range) -> Range:
    return max(one[0], other[0]), min(one[1], other[1])


def _check_within(inner: Range, outer: Range, what: str) -> None:
    if not outer[0] <= inner[0] < inner[1] <= outer[1]:
        raise ValueError(f"{what} {inner[0]}:{inner[1]} are not within {outer[0]}:{outer[1]}")
