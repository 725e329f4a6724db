"""What a store keeps, and where (pure): replicas by key, their blocks, their fences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from common.kv.blocks import BlockAllocator
from common.kv.checksum import Digests
from common.kv.token_ids import ID_BYTES, num_common
from common.replica_messages import NEVER, Placed, ReplicaItem

USED_S = 60.0
"""A replica that somebody asked for stays at least so much longer: stages may be copying it."""
COLD_S = 5.0
"""A replica that was not used for so long may leave the memory if it is on disk. Should a stage still be copying it
then, the checksum tells."""
NOBODY = ""
"""The pipeline of a replica that was found on disk: whichever claims first makes it expire."""


@dataclass(slots=True, eq=False)
class Replica:
    """KV of the first `num_tokens` tokens lies in `blocks`; `token_ids` may know more (packed int32). It belongs to the
    `pipeline` that its sequence was given to last (`placed`), of those that have written it from its beginning or asked
    for it: one that its sequence has left changes nothing.
    `digests` [plane][token] say what was received. Nobody may want it after `expires_at_s`.

    The first `num_on_disk` tokens are on disk, too. An *asleep* replica is only there: it has no blocks."""

    pipeline: str
    placed: Placed = NEVER
    token_ids: bytes = b""
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: Digests = field(default_factory=lambda: np.empty((0, 0), dtype=np.uint64))
    expires_at_s: float | None = None
    num_on_disk: int = 0
    num_due: int = 0
    """so many it has once the copy under way is over"""
    used_at_s: float = 0.0
    version: int = 0
    """rises when tokens are dropped: what was read of them before may not be whole"""

    @property
    def is_asleep(self) -> bool:
        return self.num_tokens > 0 and not self.blocks

    def put(self, start: int, digests: Digests) -> None:
        """Tokens from `start` on are there, as many as `digests` [plane][token] has; tokens behind them are void."""
        num_planes, num_tokens = digests.shape
        end = start + num_tokens
        if self.digests.shape[1] < end:
            grown = np.empty((num_planes, max(64, 2 * end)), dtype=np.uint64)
            if start:
                grown[:, :start] = self.digests[:, :start]
            self.digests = grown
        self.digests[:, start:end] = digests
        self.num_tokens = end


@dataclass(frozen=True, slots=True)
class _Session:
    """What a pipeline's driver has sent us last, and as whom we were known then."""

    epoch: int
    batch: int
    standing: int | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """The last one of a pipeline: how many tokens each of its sequences had before, and as whom we were known when the
    driver heard from us before it sent this."""

    epoch: int
    starts: dict[str, int]
    standing: int | None


_NONE = _Session(0, 0, None)


class Shelf:
    """All replicas of one store over `num_blocks` blocks. Times are those of one clock.

    A driver that takes us for dead lends the blocks that we may be reading to others, and no digest tells: so what we
    read last is *doubtful* until it has sent the next batch, which it does when it has our answer in time, or is over.
    `standing` says, before every call, as whom we are known; None: perhaps not at all. While it stays the same, nobody
    can have taken us for dead.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.replicas: dict[str, Replica] = {}
        self.standing: int | None = 0
        self._block_size = block_size
        self._sessions: dict[str, _Session] = {}
        self._batches: dict[str, _Batch] = {}
        self._allocator = BlockAllocator(num_blocks)

    def claim(self, pipeline: str, epoch: int, batch: int, expires_at_s: float) -> list[str] | None:
        """A pipeline's new epoch, or its driver had taken us for dead; its replicas expire unless they are used. The
        keys of all replicas; None: a later claim was there before."""
        known = self._sessions.get(pipeline, _NONE)
        if (epoch, batch) < (known.epoch, known.batch):
            return None
        last = self._batches.pop(pipeline, None)
        if last is not None and (last.epoch == epoch or self._is_doubtful(last)):
            self._void(pipeline, last)
        self._sessions[pipeline] = _Session(epoch, batch, self.standing)
        for replica in self.replicas.values():
            if replica.pipeline in (pipeline, NOBODY):
                replica.expires_at_s = expires_at_s
        return list(self.replicas)

    def accepts(self, pipeline: str, epoch: int) -> bool:
        """The fence: whether `epoch` is the one that claimed the pipeline."""
        return self._sessions.get(pipeline, _NONE).epoch == epoch

    def begin(self, pipeline: str, epoch: int, batch: int, items: Iterable[ReplicaItem]) -> bool:
        """A batch is about to be read. False: its driver does not want that any more."""
        known = self._sessions.get(pipeline, _NONE)
        if epoch != known.epoch or batch <= known.batch:
            return False
        self._sessions[pipeline] = _Session(epoch, batch, self.standing)
        self._batches[pipeline] = _Batch(epoch, {item.key: item.start for item in items}, known.standing)
        return True

    def make_room(self, pipeline: str, item: ReplicaItem, now_s: float) -> list[int] | None:
        """The replica's blocks, enough for the item's tokens; what it held from `start` on is void. None where the
        item does not continue what is there, or no block is free: then nothing of it is kept, but what is asleep, or
        another pipeline's."""
        replica = self.replicas.setdefault(item.key, Replica(pipeline))
        is_ours = self._is_of(pipeline, replica)
        if not is_ours and (item.start or item.placed < replica.placed):
            return None
        replica.pipeline, replica.expires_at_s, replica.used_at_s = pipeline, None, now_s
        replica.placed = max(replica.placed, item.placed)
        if replica.is_asleep and item.start:
            self.abandon(item.key, now_s)
            return None
        if item.start > replica.num_tokens:
            self.forget(item.key)
            return None
        self._cut(replica, item.start)
        replica.token_ids += item.token_ids
        if not self._grow(replica, item.start + item.num_tokens, now_s):
            self.forget(item.key)
            return None
        replica.num_due = item.start + item.num_tokens
        return replica.blocks

    def commit(self, item: ReplicaItem, digests: Digests) -> None:
        """The item's bytes are there; `digests` [plane][token] are theirs."""
        replica = self.replicas.get(item.key)
        if replica is not None:
            replica.put(item.start, digests)

    def abandon(self, key: str, now_s: float) -> None:
        """What was to be copied did not come. What was there before stays for whoever asks: its driver sends all of it
        again, or dies, or never mentions it again."""
        replica = self.replicas.get(key)
        if replica is not None:
            replica.num_due = 0
            replica.expires_at_s = now_s + USED_S

    def forget(self, key: str) -> None:
        """Drops a replica, if there is one."""
        replica = self.replicas.pop(key, None)
        if replica is not None:
            self.let_go(replica)

    def take_over(self, pipeline: str, key: str, placed: Placed) -> None:
        """The replica's sequence goes on in this pipeline, unless it has gone on to another since."""
        replica = self.replicas.get(key)
        if replica is not None and placed >= replica.placed:
            replica.pipeline, replica.placed = pipeline, placed

    def ended(self, pipeline: str, key: str) -> None:
        """Its sequence has ended in this pipeline. If it has moved to another, that one's copy stays."""
        if key in self.replicas and self._is_of(pipeline, self.replicas[key]):
            self.forget(key)

    def _is_of(self, pipeline: str, replica: Replica) -> bool:
        """What was found on disk is whoever's comes first."""
        return replica.pipeline in (pipeline, NOBODY)

    def sweep(self, now_s: float) -> None:
        """Drops what has expired."""
        for key, replica in list(self.replicas.items()):
            if replica.expires_at_s is not None and replica.expires_at_s <= now_s:
                self.forget(key)

    def locate(self, key: str, token_ids: bytes, now_s: float) -> tuple[Replica, int] | None:
        """The replica, if it is awake, and how many of its tokens a sequence with these ids can use."""
        replica = self.replicas.get(key)
        if replica is None or replica.is_asleep:
            return None
        replica.used_at_s = now_s
        if replica.expires_at_s is not None:
            replica.expires_at_s += USED_S
        num_tokens = min(self._num_sure(key, replica), num_common(replica.token_ids, token_ids))
        return (replica, num_tokens) if num_tokens else None

    # ------------------------------------------------------------ the disk below

    def found(self, key: str, token_ids: bytes) -> None:
        """A replica of these tokens is on disk."""
        num_tokens = len(token_ids) // ID_BYTES
        self.replicas[key] = Replica(NOBODY, NEVER, token_ids, num_tokens, num_on_disk=num_tokens)

    def is_asleep(self, key: str) -> bool:
        """Whether there is a replica of this key on disk alone."""
        return key in self.replicas and self.replicas[key].is_asleep

    def wake(self, asleep: Replica, num_tokens: int, now_s: float) -> Replica | None:
        """What an asleep replica is to become: with blocks for `num_tokens`, which are still to be filled. None: there
        is no room. Whoever asked hands it to `woken` or `let_go`."""
        awake = Replica(asleep.pipeline, asleep.placed, asleep.token_ids, used_at_s=now_s)
        return awake if self._grow(awake, num_tokens, now_s) else None

    def woken(self, key: str, asleep: Replica, awake: Replica) -> None:
        """`awake` has been filled, as far as its `num_tokens` say; it takes the place of the other, unless that is not
        wanted any more."""
        if self.replicas.get(key) is not asleep or not asleep.is_asleep:
            self.let_go(awake)
            return
        awake.pipeline, awake.placed, awake.expires_at_s = asleep.pipeline, asleep.placed, asleep.expires_at_s
        self.replicas[key] = awake
        if not awake.num_tokens:
            self.forget(key)

    def let_go(self, replica: Replica) -> None:
        """Frees a replica's memory."""
        if replica.blocks:
            self._allocator.release(replica)
            replica.blocks = []

    def kv_blocks(self) -> dict[str, int]:
        """For `status`."""
        return self._allocator.figures()

    def _is_doubtful(self, batch: _Batch) -> bool:
        """Whether its driver, who may be dead now, may have taken us for dead before it heard that it was read."""
        return self.standing is None or self.standing != batch.standing

    def _num_sure(self, key: str, replica: Replica) -> int:
        last = self._batches.get(replica.pipeline)
        if last is None or key not in last.starts or not self._is_doubtful(last):
            return replica.num_tokens
        return min(replica.num_tokens, last.starts[key])

    def _void(self, pipeline: str, batch: _Batch) -> None:
        """What was read for it may be of other sequences."""
        for key, start in batch.starts.items():
            replica = self.replicas.get(key)
            if replica is not None and replica.pipeline == pipeline and replica.num_tokens > start:
                self._cut(replica, start)
                if not start:
                    self.forget(key)

    def _cut(self, replica: Replica, num_tokens: int) -> None:
        """Drops the tokens behind so many."""
        if num_tokens < replica.num_tokens:
            replica.version += 1
        replica.num_tokens = num_tokens
        replica.num_on_disk = min(replica.num_on_disk, num_tokens)
        replica.token_ids = replica.token_ids[: num_tokens * ID_BYTES]

    def _grow(self, replica: Replica, num_tokens: int, now_s: float) -> bool:
        """Gives a replica blocks for so many tokens; False: there are none."""
        missing = -(-num_tokens // self._block_size) - len(replica.blocks)
        if missing <= 0:
            return True
        while (more := self._allocate(replica, missing)) is None:
            if not self._put_to_sleep(now_s):
                return False
        replica.blocks += more
        return True

    def _allocate(self, replica: Replica, count: int) -> list[int] | None:
        if replica.blocks:
            return self._allocator.extend(replica, count)
        return self._allocator.allocate(replica, count, count)

    def _put_to_sleep(self, now_s: float) -> bool:
        """Takes the memory of the replica that was left alone longest, if one is cold and on disk as a whole."""
        cold = [
            replica
            for replica in self.replicas.values()
            if replica.blocks
            and replica.num_on_disk >= max(replica.num_tokens, replica.num_due)
            and now_s - replica.used_at_s >= COLD_S
        ]
        coldest = min(cold, key=lambda replica: replica.used_at_s, default=None)
        if coldest is None:
            return False
        self.let_go(coldest)
        coldest.digests = np.empty((0, 0), dtype=np.uint64)
        coldest.version += 1
        return True
