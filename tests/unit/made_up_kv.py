"""A model that needs no arithmetic: which token follows which, and what the cache of a position holds."""

from __future__ import annotations

BLOCK_SIZE = 4
"""of token stages"""
STORE_BLOCK_SIZE = 8


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 89 + 1


def kv_of(tokens: list[int], position: int) -> int:
    """What the cache of a position holds: it depends on all ids up to there."""
    return hash(tuple(tokens[: position + 1]))


def slot(blocks: list[int], position: int, block_size: int) -> int:
    return blocks[position // block_size] * block_size + position % block_size
