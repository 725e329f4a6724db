"""What a store keeps, and where (pure): replicas by key, their blocks, their fences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.kv.blocks import BlockAllocator
from common.replica_messages import ReplicaItem

Digests = npt.NDArray[np.uint64]
ID_BYTES = 4
USED_S = 60.0
"""A replica that somebody asked for stays at least so much longer: stages may be copying it."""


@dataclass(slots=True)
class Replica:
    """KV of the first `num_tokens` tokens lies in `blocks`; `token_ids` may know more (packed int32).
    `digests` [plane][token] say what was received. Nobody may want it after `expires_at_s`."""

    pipeline: str
    token_ids: bytes = b""
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: Digests = field(default_factory=lambda: np.empty((0, 0), dtype=np.uint64))
    expires_at_s: float | None = None


class Shelf:
    """All replicas of one store over `num_blocks` blocks."""

    def __init__(self, num_blocks: int, block_size: int, num_planes: int) -> None:
        self.replicas: dict[str, Replica] = {}
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._num_planes = num_planes
        self._epochs: dict[str, int] = {}
        self._allocator = BlockAllocator(num_blocks)

    def claim(self, pipeline: str, epoch: int, expires_at_s: float) -> list[str] | None:
        """A pipeline's new epoch; its replicas expire unless they are used. The keys of all replicas; None: a later
        epoch has claimed the pipeline already."""
        if epoch < self._epochs.get(pipeline, 0):
            return None
        self._epochs[pipeline] = epoch
        for replica in self.replicas.values():
            if replica.pipeline == pipeline:
                replica.expires_at_s = expires_at_s
        return list(self.replicas)

    def accepts(self, pipeline: str, epoch: int) -> bool:
        """The fence: whether `epoch` is the one that claimed the pipeline."""
        return self._epochs.get(pipeline) == epoch

    def make_room(self, pipeline: str, item: ReplicaItem) -> list[int] | None:
        """The replica's blocks, enough for the item's tokens; what it held from `start` on is void. None where the
        item does not continue what is there, or no block is free: then nothing of it is kept."""
        replica = self.replicas.setdefault(item.key, Replica(pipeline))
        replica.pipeline, replica.expires_at_s = pipeline, None
        if item.start > replica.num_tokens:
            self.forget(item.key)
            return None
        replica.num_tokens = item.start
        replica.token_ids = replica.token_ids[: item.start * ID_BYTES] + item.token_ids
        missing = -(-(item.start + item.num_tokens) // self._block_size) - len(replica.blocks)
        if missing > 0:
            more = self._allocate(item.key, missing, is_first=not replica.blocks)
            if more is None:
                self.forget(item.key)
                return None
            replica.blocks += more
        return replica.blocks

    def commit(self, item: ReplicaItem, digests: Digests) -> None:
        """The item's bytes are there; `digests` [plane][token] are theirs."""
        replica = self.replicas.get(item.key)
        if replica is None:
            return
        end = item.start + item.num_tokens
        if replica.digests.shape[1] < end:
            grown = np.empty((self._num_planes, max(64, 2 * end)), dtype=np.uint64)
            if item.start:
                grown[:, : item.start] = replica.digests[:, : item.start]
            replica.digests = grown
        replica.digests[:, item.start : end] = digests
        replica.num_tokens = end

    def forget(self, key: str) -> None:
        """Drops a replica, if there is one."""
        replica = self.replicas.pop(key, None)
        if replica is not None and replica.blocks:
            self._allocator.release(key)

    def expire(self, key: str, at_s: float) -> None:
        """The replica is dropped at `at_s` unless it is used until then."""
        replica = self.replicas.get(key)
        if replica is not None:
            replica.expires_at_s = at_s

    def sweep(self, now_s: float) -> None:
        """Drops what has expired."""
        for key, replica in list(self.replicas.items()):
            if replica.expires_at_s is not None and replica.expires_at_s <= now_s:
                self.forget(key)

    def clear(self) -> None:
        """Drops everything: nobody can know any more what happened to the pools it was read from."""
        for key in list(self.replicas):
            self.forget(key)

    def locate(self, key: str, token_ids: bytes) -> tuple[Replica, int] | None:
        """The replica and how many of its tokens a sequence with these ids can use."""
        replica = self.replicas.get(key)
        if replica is None:
            return None
        if replica.expires_at_s is not None:
            replica.expires_at_s += USED_S
        limit = min(replica.num_tokens, len(token_ids) // ID_BYTES)
        ours = np.frombuffer(replica.token_ids, dtype="<i4", count=limit)
        differing = np.flatnonzero(ours != np.frombuffer(token_ids, dtype="<i4", count=limit))
        num_tokens = int(differing[0]) if len(differing) else limit
        return (replica, num_tokens) if num_tokens else None

    def kv_blocks(self) -> dict[str, int]:
        return {"total": self._num_blocks, "free": self._allocator.num_free, "quarantined": 0}

    def _allocate(self, key: str, count: int, *, is_first: bool) -> list[int] | None:
        blocks = self._allocator.allocate(key, count, count) if is_first else self._allocator.extend(key, count)
        return None if blocks is None else list(blocks)
