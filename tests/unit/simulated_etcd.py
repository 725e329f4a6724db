"""etcd in memory, for the client's callers: revisions, leases, transactions, watches, and outages of both kinds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from common.etcd.client import (
    CALL_DEADLINE_S,
    Compare,
    EtcdClient,
    KeyValue,
    Put,
    TransactionResult,
    WatchEvent,
)
from common.etcd.errors import EtcdLeaseNotFound, EtcdUnavailable
from tests.unit.virtual_time import Process

LATENCY_S = (0.0005, 0.003)
WATCH_LAGS_S = (0.0, 0.0, 0.0, 0.02, 0.3)
"""One of two watches of a process may be behind the other."""
EXPIRY_S = 0.5
"""etcd looks for lapsed leases so often."""


@dataclass(slots=True)
class _LiveLease:
    ttl_s: float
    ends_at_s: float
    keys: set[str] = field(default_factory=set)


class SimulatedEtcd:
    """The server. `on_write(process, puts)` sees every transaction that is applied, just before it is."""

    def __init__(self, draws: random.Random, on_write: Callable[[Process, Sequence[Put]], None]) -> None:
        self.draws = draws
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self.leases: dict[int, _LiveLease] = {}
        self.history: list[tuple[float, WatchEvent]] = []
        """what happened, and when"""
        self.changed = asyncio.Event()
        self.up = asyncio.Event()
        self.up.set()
        self.on_write = on_write
        self._num_leases = 0

    @property
    def now_s(self) -> float:
        return time.monotonic()

    async def expire(self) -> None:
        """Runs for ever."""
        while True:
            await asyncio.sleep(EXPIRY_S * self.draws.uniform(0.5, 1.0))
            if self.up.is_set():
                for lease_id in [id for id, lease in self.leases.items() if lease.ends_at_s < self.now_s]:
                    self.end_lease(lease_id)

    def go_down(self) -> None:
        self.up.clear()

    def come_up(self, *, was_stopped: bool) -> None:
        """After SIGCONT leases have lapsed as the clock says; a restart gives each its full time again."""
        if not was_stopped:
            for lease in self.leases.values():
                lease.ends_at_s = self.now_s + lease.ttl_s
        self.up.set()

    # ------------------------------------------------------------ what it does (all at once)

    def grant(self, ttl_s: float) -> int:
        self._num_leases += 1
        self.leases[self._num_leases] = _LiveLease(ttl_s, self.now_s + ttl_s)
        return self._num_leases

    def end_lease(self, lease_id: int) -> None:
        keys = self.leases.pop(lease_id).keys
        if keys:
            self.revision += 1
        for key in sorted(keys):
            self._delete(key)

    def holds(self, compare: Compare) -> bool:
        found = self.keys.get(compare.key)
        match compare.target:
            case "create":
                return (0 if found is None else found.create_revision) == compare.expected
            case "mod":
                return (0 if found is None else found.mod_revision) == compare.expected

    def apply(self, puts: Sequence[Put]) -> None:
        for put in puts:
            if put.lease_id and put.lease_id not in self.leases:
                raise EtcdLeaseNotFound(str(put.lease_id))
        self.revision += bool(puts)
        for put in puts:
            self._put(put.key, put.value, put.lease_id)

    def _put(self, key: str, value: bytes, lease_id: int) -> None:
        known = self.keys.get(key)
        if known is not None and known.lease_id in self.leases:
            self.leases[known.lease_id].keys.discard(key)
        if lease_id:
            self.leases[lease_id].keys.add(key)
        created = self.revision if known is None else known.create_revision
        self.keys[key] = KeyValue(key, value, created, self.revision, lease_id)
        self._tell(WatchEvent("put", key, value, self.revision, lease_id))

    def _delete(self, key: str) -> None:
        del self.keys[key]
        self._tell(WatchEvent("delete", key, b"", self.revision, 0))

    def _tell(self, event: WatchEvent) -> None:
        self.history.append((self.now_s, event))
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class SimulatedClient(EtcdClient):
    """The client of one process. `is_cut_off`: nothing of it reaches etcd."""

    def __init__(self, etcd: SimulatedEtcd, process: Process) -> None:
        super().__init__("http://simulated:1")
        self.is_cut_off = False
        self._etcd = etcd
        self._process = process

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def get(self, key: str, deadline_s: float = CALL_DEADLINE_S) -> KeyValue | None:
        await self._reach(deadline_s)
        found = self._etcd.keys.get(key)
        await self._answer()
        return found

    async def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        await self._reach()
        found = [self._etcd.keys[key] for key in sorted(self._etcd.keys) if key.startswith(prefix)]
        revision = self._etcd.revision
        await self._answer()
        return found, revision

    async def transaction(self, compares: Sequence[Compare], puts: Sequence[Put]) -> TransactionResult:
        await self._reach()
        succeeded = all(self._etcd.holds(compare) for compare in compares)
        written = puts if succeeded else ()
        self._etcd.on_write(self._process, written)
        self._etcd.apply(written)
        result = TransactionResult(succeeded, self._etcd.revision)
        await self._answer()
        return result

    async def grant_lease(self, ttl_s: float) -> tuple[int, float]:
        await self._reach()
        lease_id = self._etcd.grant(ttl_s)
        await self._answer()
        return lease_id, ttl_s

    async def keep_lease(self, lease_id: int, deadline_s: float) -> None:
        await self._reach(deadline_s)
        lease = self._etcd.leases.get(lease_id)
        if lease is not None:
            lease.ends_at_s = self._etcd.now_s + lease.ttl_s
        await self._answer()
        if lease is None:
            raise EtcdLeaseNotFound(str(lease_id))

    async def revoke_lease(self, lease_id: int, deadline_s: float = CALL_DEADLINE_S) -> None:
        await self._reach(deadline_s)
        found = lease_id in self._etcd.leases
        if found:
            self._etcd.end_lease(lease_id)
        await self._answer()
        if not found:
            raise EtcdLeaseNotFound(str(lease_id))

    async def watch_prefix(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchEvent, None]:
        position = 0
        lag_s = self._etcd.draws.choice(WATCH_LAGS_S)
        while True:
            changed = self._etcd.changed
            while position < len(self._etcd.history):
                happened_at_s, event = self._etcd.history[position]
                position += 1
                if event.mod_revision >= from_revision and event.key.startswith(prefix):
                    await asyncio.sleep(max(0.0, happened_at_s + lag_s - self._etcd.now_s))
                    await self._travel()
                    while not self._is_reachable:  # noqa: ASYNC110 - many reasons
                        await asyncio.sleep(0.1)
                    yield event
            await changed.wait()

    # ------------------------------------------------------------ the way there and back

    @property
    def _is_reachable(self) -> bool:
        return self._etcd.up.is_set() and not self.is_cut_off and not self._process.is_dead

    async def _travel(self) -> None:
        await asyncio.sleep(self._etcd.draws.uniform(*LATENCY_S))
        await self._process.turn()

    async def _reach(self, deadline_s: float = CALL_DEADLINE_S) -> None:
        """The request arrives. Raises `EtcdUnavailable`."""
        end_s = self._etcd.now_s + deadline_s
        await self._travel()
        while not self._is_reachable:
            if self._etcd.now_s >= end_s or self._process.is_dead:
                raise EtcdUnavailable(self.url, "simulated outage")
            await asyncio.sleep(0.05)

    async def _answer(self) -> None:
        """So does the answer. Raises `EtcdUnavailable`: it has been done all the same."""
        await self._travel()
        if not self._is_reachable:
            raise EtcdUnavailable(self.url, "no answer in a simulated outage")
