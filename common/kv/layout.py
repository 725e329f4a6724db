"""How a pool of KV blocks lies in memory, without touching any.

Order: [layer][key | value][block][slot][head][dim]. A run of consecutive blocks of one layer is therefore one
contiguous piece of bytes for the keys and one for the values; such a [block][slot][head][dim] part is a
*plane*."""

from __future__ import annotations

import msgspec

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1}
"""Bytes per element of the dtypes a pool can have."""
QUANTISED = ("int8", "fp8")
"""Dtypes to travel and to be stored as, not to compute with: each head of a token is codes and their scale."""
SCALE_BYTES = 4


class PoolLayout(msgspec.Struct, frozen=True):
    """Shape of one pool: layers [first_layer, last_layer) of a model, counted from the model's first layer,
    and KV heads [first_head, first_head + num_kv_heads). `fingerprint` names the model."""

    first_layer: int
    last_layer: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    fingerprint: str
    first_head: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` for a shape that cannot be, also when a peer sent it."""
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_SIZES)}")
        sizes = (self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        if min(sizes) < 1 or self.first_head < 0 or not 0 <= self.first_layer < self.last_layer:
            raise ValueError(f"no pool has this shape: {self}")

    @property
    def num_layers(self) -> int:
        return self.last_layer - self.first_layer

    @property
    def layers(self) -> tuple[int, int]:
        return self.first_layer, self.last_layer

    @property
    def heads(self) -> tuple[int, int]:
        return self.first_head, self.first_head + self.num_kv_heads

    @property
    def itemsize(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """One head of one token, with its scale if it is quantised: the smallest piece there is."""
        return self.head_dim * self.itemsize + (SCALE_BYTES if self.dtype in QUANTISED else 0)

    @property
    def slot_bytes(self) -> int:
        """The keys (or the values) of one token in one layer."""
        return self.num_kv_heads * self.head_bytes

    @property
    def bytes_per_token_layer(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.slot_bytes

    @property
    def bytes_per_block(self) -> int:
        """One block in all layers of the pool, keys and values."""
        return self.block_size * self.bytes_per_token_layer * self.num_layers

    @property
    def plane_bytes(self) -> int:
        """All keys (or all values) of one layer."""
        return self.num_blocks * self.block_size * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return 2 * self.num_layers * self.plane_bytes

    def planes(self, layer_range: tuple[int, int]) -> tuple[int, int]:
        """The pool's planes [first, end) that are those of these layers, counted from the model's first."""
        return 2 * (layer_range[0] - self.first_layer), 2 * (layer_range[1] - self.first_layer)


def num_blocks_for(layout: PoolLayout, memory_bytes: int) -> int:
    """How many blocks of this shape fit into `memory_bytes`; the layout's own `num_blocks` plays no part."""
    return memory_bytes // layout.bytes_per_block
