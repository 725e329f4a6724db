"""A model that needs no arithmetic: which token follows which, and what the cache of a position holds."""

from __future__ import annotations

BLOCK_SIZE = 4
"""of token stages"""
STORE_BLOCK_SIZE = 8


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 89 + 1


def kv_of(tokens: list[int], end: int) -> list[int]:
    """What the caches of positions [0, end) hold: each depends on all ids up to there."""
    value = 0
    return [value := hash((value, token)) for token in tokens[:end]]


def slots(blocks: list[int], start: int, end: int, block_size: int) -> list[int]:
    """Where positions [start, end) lie in a pool."""
    return [blocks[position // block_size] * block_size + position % block_size for position in range(start, end)]
