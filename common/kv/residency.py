"""The device as a cache of a host pool: which sequences lie there, and how they come and go.

The host pool is the truth: what is computed on the device is written through, so that anything on the device may be
dropped at any moment. Whole sequences come in, ahead of their turn, on a thread (on a GPU: a stream) of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch

from common.kv.blocks import BlockAllocator
from common.kv.device_copies import copy_between
from common.kv.geometry import CopyPlan, Int64, plan_slots
from common.kv.pool import KvPool
from common.kv.staging import SideStream


@dataclass(frozen=True, slots=True)
class Want:
    """A sequence that a step needs: the first `num_tokens` tokens of `host_blocks` are to be on the device, with room
    for `num_slots` tokens."""

    owner: Hashable
    host_blocks: Sequence[int]
    num_tokens: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class Entered:
    """What it took to have a step's sequences on the device: how long the step waited, and what was copied (also ahead
    of it), in how many seconds of the copying thread."""

    waited_s: float
    num_blocks: int
    copy_s: float


@dataclass(slots=True)
class _Resident:
    """`num_tokens` are there, or will be once `arrival` is over."""

    blocks: list[int]
    num_tokens: int
    last_used: int
    arrival: Future[tuple[int, float]] | None = None


class Residency:
    """One device pool over one host pool of the same shape. All methods are called by one thread, which computes;
    copies from the host run in `copier`, one after the other. `keeps_idle`: what no step wants stays until its room is
    needed; else it leaves at once, and never more than two steps' sequences are on the device."""

    def __init__(
        self,
        host: KvPool,
        device: KvPool,
        copier: Executor,
        *,
        keeps_idle: bool,
        host_seen: torch.Tensor | None = None,
    ) -> None:
        """`host_seen`: the host pool as the GPU sees it (see `PageLock`)."""
        self.device = device
        self.peak_blocks = 0
        self.swapped_in_bytes = 0
        self.waited_s = 0.0
        self._host = host
        self._host_seen = host_seen
        self._copier = copier
        self._keeps_idle = keeps_idle
        self._allocator = BlockAllocator(device.layout.num_blocks)
        self._resident: dict[Hashable, _Resident] = {}
        self._num_steps = 0
        self._stream = SideStream(device.device)

    @property
    def num_resident_blocks(self) -> int:
        """Blocks of the device pool that hold something."""
        return sum(len(resident.blocks) for resident in self._resident.values())

    def blocks(self, owner: Hashable) -> list[int]:
        """The device blocks of a sequence that a step has entered with. Raises `KeyError` for another."""
        return self._resident[owner].blocks

    def drop(self, owner: Hashable) -> None:
        """A sequence is over; its host blocks may be given to others."""
        resident = self._resident.pop(owner, None)
        if resident is None:
            return
        if resident.arrival is not None:
            resident.arrival.result()
        self._allocator.release(owner)

    def enter(self, needed: Sequence[Want], upcoming: Sequence[Want]) -> Entered:
        """Returns when all that a step needs is on the device, and begins to bring in what the next one will need, as
        far as there is room. Raises `ValueError` where the device cannot hold what is needed."""
        self._num_steps += 1
        users = {want.owner for want in needed}
        wanted = users | {want.owner for want in upcoming}
        if not self._keeps_idle:
            for owner in [owner for owner in self._resident if owner not in wanted]:
                self.drop(owner)
        missing = [want for want in needed if self._lacks(want)]
        for want in needed:
            if not self._reserve(want, users):
                raise ValueError(f"{len(needed)} sequences do not fit {self._allocator.num_blocks} blocks together")
        self._begin_copy(missing)
        entered = self._await(users)
        ahead = [want for want in upcoming if self._lacks(want) and want.owner not in users]
        self._begin_copy([want for want in ahead if self._reserve(want, wanted)])
        return entered

    def write_through(self, spans: Iterable[tuple[Hashable, Sequence[int], int, int]]) -> None:
        """New tokens (owner, host blocks, first token, end) go to the host pool; returns when they are there."""
        from_slots: list[int] = []
        to_slots: list[int] = []
        size = self._host.block_size
        for owner, host_blocks, start, end in spans:
            resident = self._resident[owner]
            resident.num_tokens, blocks = end, resident.blocks
            from_slots += (blocks[token // size] * size + token % size for token in range(start, end))
            to_slots += (host_blocks[token // size] * size + token % size for token in range(start, end))
        if from_slots:
            plan = self._plan(self.device, np.array(from_slots), self._host, np.array(to_slots))
            copy_between(plan, self.device, self._host, self._host_seen)
            if self.device.device.type == "cuda":
                # behind the compute, on its own stream
                torch.cuda.current_stream(self.device.device).synchronize()

    # ------------------------------------------------------------ room

    def _lacks(self, want: Want) -> bool:
        resident = self._resident.get(want.owner)
        return resident is None or resident.num_tokens < want.num_tokens

    def _reserve(self, want: Want, keep: set[Hashable]) -> bool:
        """Room for a sequence; who is not in `keep` may have to leave for it."""
        needed = max(1, -(-want.num_slots // self._host.block_size))
        resident = self._resident.get(want.owner)
        missing = needed - (0 if resident is None else len(resident.blocks))
        while missing > self._allocator.num_free:
            if not self._evict_one(keep):
                return False
        if resident is None:
            blocks = self._allocator.allocate(want.owner, needed, needed + 1)
            self._resident[want.owner] = _Resident(list(blocks or ()), 0, self._num_steps)
        else:
            resident.last_used = self._num_steps
            if missing > 0:
                resident.blocks += self._allocator.extend(want.owner, missing) or []
        self.peak_blocks = max(self.peak_blocks, self.num_resident_blocks)
        return True

    def _evict_one(self, keep: set[Hashable]) -> bool:
        """The most recently used leaves first: in a rotation its turn comes last."""
        idle = [(resident.last_used, owner) for owner, resident in self._resident.items() if owner not in keep]
        if not idle:
            return False
        self.drop(max(idle, key=lambda each: each[0])[1])
        return True

    # ------------------------------------------------------------ copies

    def _begin_copy(self, wants: Sequence[Want]) -> None:
        if not wants:
            return
        size = self._host.block_size
        from_slots = np.concatenate([_slots(want.host_blocks, want.num_tokens, size) for want in wants])
        to_slots = np.concatenate([_slots(self._resident[w.owner].blocks, w.num_tokens, size) for w in wants])
        arrival = self._copier.submit(self._timed_copy, from_slots, to_slots)
        for want in wants:
            resident = self._resident[want.owner]
            resident.num_tokens, resident.arrival = want.num_tokens, arrival

    def _await(self, owners: set[Hashable]) -> Entered:
        started_s = time.perf_counter()
        # a copy that several came with counts once
        arrivals = {id(a): a for owner in owners if (a := self._resident[owner].arrival) is not None}
        copies = [arrival.result() for arrival in arrivals.values()]
        for owner in owners:
            self._resident[owner].arrival = None
        waited_s = time.perf_counter() - started_s if copies else 0.0
        num_bytes = sum(copied for copied, _ in copies)
        self.waited_s += waited_s
        self.swapped_in_bytes += num_bytes
        num_blocks = -(-num_bytes // self._host.layout.bytes_per_block)
        return Entered(waited_s, num_blocks, sum(seconds for _, seconds in copies))

    def _timed_copy(self, from_slots: Int64, to_slots: Int64) -> tuple[int, float]:
        started_s = time.perf_counter()
        plan = self._plan(self._host, from_slots, self.device, to_slots)
        with self._stream.work():
            copy_between(plan, self._host, self.device, self._host_seen)
        return plan.total_bytes, time.perf_counter() - started_s

    def _plan(self, source: KvPool, from_slots: Int64, destination: KvPool, to_slots: Int64) -> CopyPlan:
        layout = source.layout
        if not len(from_slots):
            return CopyPlan(from_slots, to_slots, np.zeros(0, dtype=np.int64))
        return plan_slots(layout, from_slots, destination.layout, to_slots, layout.layers, layout.heads)


def probe_s_per_byte(
    host: KvPool, device: KvPool, num_blocks: int = 64, host_seen: torch.Tensor | None = None
) -> float:
    """How long a byte takes from host to device: the best of three copies of some blocks."""
    num_blocks = min(num_blocks, host.layout.num_blocks, device.layout.num_blocks)
    slots = np.arange(num_blocks * host.block_size)
    layout = host.layout
    plan = plan_slots(layout, slots, device.layout, slots, layout.layers, layout.heads)
    copy = functools.partial(copy_between, plan, host, device, host_seen)
    return min(_seconds(copy, device) for _ in range(3)) / plan.total_bytes


def _seconds(copy: functools.partial[None], device: KvPool) -> float:
    started_s = time.perf_counter()
    copy()
    if device.device.type == "cuda":
        torch.cuda.synchronize(device.device)
    return time.perf_counter() - started_s


def _slots(blocks: Sequence[int], num_tokens: int, block_size: int) -> Int64:
    table = np.asarray(blocks[: -(-num_tokens // block_size)], dtype=np.int64)
    slots: Int64 = (table[:, None] * block_size + np.arange(block_size)).ravel()[:num_tokens]
    return slots
