"""The checksum of blocks in device memory, computed there: eight bytes per token and plane leave the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from common.kv.checksum import Digests, SpanBinding, checksum_of, word_factors
from common.kv.geometry import Int64, Range, span_slots
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.kv.staging import checking_stream

_WORDS = {8: (torch.int64, -1), 4: (torch.int32, 0xFFFFFFFF), 2: (torch.int16, 0xFFFF)}
"""Words by their bytes: torch has signed ones only, so what widens their sign is masked away."""
_MAX_BYTES = 64 << 20
"""So much is looked at at once; each takes a few times as much memory meanwhile."""


def device_checksum(pool: KvPool, blocks: Sequence[int], binding: SpanBinding, head_range: Range | None = None) -> int:
    """`span_checksum` of a pool on any device, of what work on streams that has been waited for has left there. Raises
    `ValueError` where the pool or the block table does not hold the span."""
    heads = head_range or pool.layout.heads
    slots = span_slots(pool.layout, blocks, binding.token_range, binding.layer_range, heads)
    with checking_stream(pool.device).work():
        digests = _slot_digests(pool.arena, pool.layout, slots, binding.layer_range, heads)
    return checksum_of(digests, binding)


def _slot_digests(arena: torch.Tensor, layout: PoolLayout, slots: Int64, layer_range: Range, heads: Range) -> Digests:
    """See `checksum.slot_digests`."""
    width = next(width for width in _WORDS if layout.head_bytes % width == 0)
    dtype, mask = _WORDS[width]
    words = arena.view(dtype).view(2 * layout.num_layers, layout.num_blocks * layout.block_size, -1)
    words_per_head = layout.head_bytes // width
    words = words[:, :, slice(*((head - layout.first_head) * words_per_head for head in heads))]
    is_run = bool((np.diff(slots) == 1).all())
    index = None if is_run else torch.from_numpy(slots).to(arena.device)
    factors = _factors(words.shape[2], arena.device)
    first, last = layout.planes(layer_range)
    step = max(1, _MAX_BYTES // (len(slots) * words.shape[2] * width))
    digests = []
    for plane in range(first, last, step):
        planes = words[plane : min(plane + step, last)]
        some = planes.narrow(1, int(slots[0]), len(slots)) if index is None else planes.index_select(1, index)
        wide = some if width == 8 else some.to(torch.int64).bitwise_and_(mask)
        # sums and products of 64 bits wrap around, signed ones like unsigned ones
        digests.append((wide * factors).sum(-1))
    return torch.cat(digests).cpu().numpy().view(np.uint64)


@functools.cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(word_factors(count).view(np.int64)).to(device)
