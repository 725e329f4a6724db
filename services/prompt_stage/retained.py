"""Prompts whose KV still lies in a prompt pipeline's pool though nobody computes them any more (pure).

Their blocks are free for whoever needs them, the longest left alone first. Until then the same request finds them:
another of its choices, or a sequence whose token pipeline died before any store had its KV, hands off what is there
instead of computing it again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from common.kv.token_ids import num_common


@dataclass(frozen=True, slots=True)
class Kept:
    """`lease` owns `blocks`, whose first slots hold the KV of `token_ids` (packed)."""

    lease: int
    request_id: str
    blocks: list[int]
    token_ids: bytes


class Retained:
    """What one prompt pipeline keeps at one epoch."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self._kept: OrderedDict[int, Kept] = OrderedDict()

    def keep(self, kept: Kept) -> None:
        """The blocks belong to nobody else until they are taken."""
        self._kept[kept.lease] = kept
        self.num_blocks += len(kept.blocks)

    def take(self, request_id: str, token_ids: bytes) -> tuple[Kept, int] | None:
        """Of what the request left here that which begins most like `token_ids`, and how many tokens agree."""
        own = [
            (kept, num_common(kept.token_ids, token_ids))
            for kept in self._kept.values()
            if kept.request_id == request_id
        ]
        best = max(own, key=lambda each: each[1], default=None)
        if best is None or not best[1]:
            return None
        self._remove(best[0])
        return best

    def take_oldest(self) -> Kept | None:
        """What was left alone longest, for its blocks."""
        oldest = next(iter(self._kept.values()), None)
        if oldest is not None:
            self._remove(oldest)
        return oldest

    def _remove(self, kept: Kept) -> None:
        del self._kept[kept.lease]
        self.num_blocks -= len(kept.blocks)
