"""The KV pool of some layers of a model, as large as memory allows."""

from __future__ import annotations

import msgspec

from common.kv.layout import PoolLayout, num_blocks_for
from common.model.spec import ModelSpec
from dejavu.errors import ConfigurationError


def fitting_layout(spec: ModelSpec, layers: tuple[int, int], block_size: int, memory_bytes: int) -> PoolLayout:
    """The layout of a pool for `layers` [first, end) with as many blocks as `memory_bytes` hold. Raises
    `ConfigurationError` where they hold none."""
    first, last = layers
    layout = PoolLayout(first, last, 1, block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.fingerprint)
    num_blocks = num_blocks_for(layout, memory_bytes)
    if num_blocks < 1:
        raise ConfigurationError(
            f"{memory_bytes} bytes hold no block: {block_size} tokens of {last - first} layers "
            f"need {layout.bytes_per_block} bytes",
            field="kv_memory",
        )
    return msgspec.structs.replace(layout, num_blocks=num_blocks)
