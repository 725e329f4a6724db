"""What a writer tells the owner of a pool once a span is there, and how the owner checks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.kv.checksum import SpanBinding, span_checksum
from common.kv.geometry import Range
from common.kv.pool import KvPool


@dataclass(frozen=True, slots=True)
class Arrival:
    """The KV of tokens [start, start + num_tokens) in `layers` lies in the destination's `blocks`, the block
    table from the sequence's token 0. `destination` and `stage_index` say whose pool."""

    destination: str
    stage_index: int
    sequence_id: str
    attempt: int
    layers: Range
    start: int
    num_tokens: int
    blocks: Sequence[int]
    token_hash: bytes
    checksum: int


class ArrivedSpan(Protocol):
    """An `Arrival`, or any message with these fields."""

    @property
    def sequence_id(self) -> str: ...
    @property
    def layers(self) -> Range: ...
    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def token_hash(self) -> bytes: ...
    @property
    def checksum(self) -> int: ...


def verify_arrival(pool: KvPool, arrived: ArrivedSpan) -> bool:
    """Whether `pool` holds what the writer says it does; False also for a span that the pool cannot hold.

    Reads every byte of the span: run it off the event loop (most of it happens without the interpreter lock).
    """
    token_range = (arrived.start, arrived.start + arrived.num_tokens)
    binding = SpanBinding(pool.layout.fingerprint, arrived.sequence_id, arrived.layers, token_range, arrived.token_hash)
    try:
        return pool_checksum(pool, arrived.blocks, binding) == arrived.checksum
    except ValueError:
        return False


def pool_checksum(pool: KvPool, blocks: Sequence[int], binding: SpanBinding, head_range: Range | None = None) -> int:
    """`span_checksum` of a pool on any device. Raises `ValueError`."""
    if not pool.is_host:
        # it needs torch, which takes a second to import and which nobody without a device has use for
        from common.kv.device_checksum import device_checksum

        return device_checksum(pool, blocks, binding, head_range)
    return span_checksum(pool.memory, pool.layout, blocks, binding, head_range)
