"""A cache store over a pool of made-up KV: the real shelf, and nobody who reads but itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from common.replica_messages import Claim, Locate, ReplicaItem, Replicate
from services.cache_store.shelf import Shelf
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, slots


class Store:
    """Messages are worked off in order."""

    def __init__(self, num_blocks: int) -> None:
        self.shelf = Shelf(num_blocks, STORE_BLOCK_SIZE)
        self.pool: dict[int, int] = {}
        self.inbox: deque[Claim | Replicate | Locate] = deque()
        self.answer: tuple[int, int, list[str]] = (0, 0, [])
        """to the last batch: its epoch and number, and what could not be kept"""
        self.dropped: dict[str, int] = {}
        """how many tokens it has dropped to refuse more of a sequence, as long as its answer has not arrived"""

    def keep(self, item: ReplicaItem, stage_pool: Mapping[int, int]) -> bool:
        """Copies an item out of a token stage's pool. False: there is no room for it."""
        before = self.shelf.replicas.get(item.key)
        had = 0 if before is None else before.num_tokens
        blocks = self.shelf.make_room("token-0", item, 0.0)
        if blocks is None:
            self.dropped[item.key] = had
            return False
        start, offset = item.start, item.start % BLOCK_SIZE
        sources = slots(item.blocks, offset, offset + item.num_tokens, BLOCK_SIZE)
        places = slots(blocks, start, start + item.num_tokens, STORE_BLOCK_SIZE)
        # of blocks that were given away it reads what happens to be there
        self.pool.update((place, stage_pool.get(source, 0)) for place, source in zip(places, sources, strict=True))
        self.shelf.commit(item, np.zeros((1, item.num_tokens), dtype=np.uint64))
        return True
