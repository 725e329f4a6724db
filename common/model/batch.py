"""What one pass of a stage works on: any mix of prompt chunks and token steps, packed into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """`num_tokens` tokens of a sequence, the first at position `start` (so many are in the pool already); `blocks` is
    the block table that covers start + num_tokens. `want_logits`: the last token's logits are wanted."""

    start: int
    num_tokens: int
    blocks: Sequence[int]
    want_logits: bool


@dataclass(frozen=True, slots=True)
class StageBatch:
    """Chunks in order and their token ids, one after the other."""

    chunks: Sequence[SequenceChunk]
    token_ids: Sequence[int]
