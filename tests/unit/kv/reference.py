"""A KV cache kept the plain way, one entry per token: what the library's arithmetic is compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from common.kv.geometry import Range
from common.kv.layout import PoolLayout
from common.kv.pool import Bytes

SMALL = PoolLayout(
    first_layer=0,
    last_layer=4,
    num_blocks=8,
    block_size=4,
    num_kv_heads=2,
    head_dim=8,
    dtype="float32",
    fingerprint="model",
)
"""4 layers, 32 tokens."""


def layout(**fields: int | str) -> PoolLayout:
    return msgspec.structs.replace(SMALL, **fields)


def table(generator: random.Random, num_blocks: int, count: int) -> list[int]:
    """`count` different blocks: one run, or several pieces."""
    if generator.random() < 0.5:
        first = generator.randint(0, num_blocks - count)
        return list(range(first, first + count))
    return generator.sample(range(num_blocks), count)


class ReferenceCache:
    """Random keys and values [layer][key | value][token][head][byte] for all layers and heads of a model."""

    def __init__(self, any_layout: PoolLayout, num_tokens: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._cache = generator.integers(
            0, 256, (NUM_LAYERS, 2, num_tokens, NUM_HEADS, any_layout.head_bytes), dtype=np.uint8
        )

    def written_to(
        self,
        to: PoolLayout,
        blocks: Sequence[int],
        token_range: Range | None = None,
        layer_range: Range | None = None,
        head_range: Range | None = None,
        filler: int = 0,
    ) -> Bytes:
        """A pool's memory with the cache's span in it, by default all of it."""
        memory = np.full(to.total_bytes, filler, dtype=np.uint8)
        pool = memory.reshape(to.num_layers, 2, to.num_blocks, to.block_size, to.num_kv_heads, to.head_bytes)
        heads = slice(*(head_range or to.heads))
        own_heads = slice(heads.start - to.first_head, heads.stop - to.first_head)
        layers = slice(*(layer_range or to.layers))
        own_layers = slice(layers.start - to.first_layer, layers.stop - to.first_layer)
        for token in range(*(token_range or (0, self._cache.shape[2]))):
            block, slot = blocks[token // to.block_size], token % to.block_size
            pool[own_layers, :, block, slot, own_heads] = self._cache[layers, :, token, heads]
        return memory


NUM_LAYERS = 8
NUM_HEADS = 6


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pools that cut the same model differently, and a span that both hold."""

    source: PoolLayout
    source_blocks: list[int]
    destination: PoolLayout
    destination_blocks: list[int]
    num_tokens: int
    token_range: Range
    layer_range: Range
    head_range: Range


def random_pair(generator: random.Random) -> Pair:
    num_tokens = generator.randint(1, 40)
    layer_range = _range(generator, NUM_LAYERS)
    head_range = _range(generator, NUM_HEADS)
    head_dim = generator.choice([1, 2, 3, 8])
    dtype = generator.choice(["float32", "float16", "bfloat16"])

    def pool() -> tuple[PoolLayout, list[int]]:
        first_layer, last_layer = _around(generator, layer_range, NUM_LAYERS)
        first_head, last_head = _around(generator, head_range, NUM_HEADS)
        block_size = generator.choice([1, 2, 3, 4, 8, 16])
        used = -(-num_tokens // block_size)
        num_blocks = used + generator.randint(0, 4)
        pool_layout = PoolLayout(
            first_layer=first_layer,
            last_layer=last_layer,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=last_head - first_head,
            head_dim=head_dim,
            dtype=dtype,
            fingerprint="model",
            first_head=first_head,
        )
        return pool_layout, table(generator, num_blocks, used)

    return Pair(*pool(), *pool(), num_tokens, _range(generator, num_tokens), layer_range, head_range)


def _range(generator: random.Random, end: int) -> Range:
    first = generator.randrange(end)
    return first, generator.randint(first + 1, end)


def _around(generator: random.Random, inner: Range, end: int) -> Range:
    """A range that contains `inner`, often exactly."""
    if generator.random() < 0.4:
        return inner
    return generator.randint(0, inner[0]), generator.randint(inner[1], end)
