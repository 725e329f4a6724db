"""A lease that lives as long as the event loop of its process turns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from common.etcd.client import EtcdClient, backoff_s
from common.etcd.errors import EtcdError, EtcdLeaseNotFound, EtcdUnavailable

logger = logging.getLogger(__name__)

REVOKE_DEADLINE_S = 1.0


async def _nothing() -> None:
    pass


class Lease:
    """`await lease.grant()`, then run `lease.keep()` as a task: a coroutine of the event loop, not a thread,
    so that a process whose loop is stuck loses its lease.

    `keep` renews about every third of the time to live and calls `on_renewed` each time; when the lease has
    lapsed, it takes a new one (another `id`) first. An outage of etcd never ends it.
    """

    def __init__(self, client: EtcdClient, ttl_s: float, on_renewed: Callable[[], Awaitable[None]] = _nothing) -> None:
        self._client = client
        self._on_renewed = on_renewed
        self._renewed_at_s = 0.0
        self._held_since_s = 0.0
        self._is_outage = False
        self.ttl_s = ttl_s
        self.id = 0
        """0 while there is no lease"""

    async def grant(self) -> None:
        """Takes a new lease. Raises `EtcdUnavailable`."""
        asked_at_s = time.monotonic()
        self.id, self.ttl_s = await self._client.grant_lease(self.ttl_s)
        self._renewed_at_s = asked_at_s
        self._held_since_s = time.monotonic()

    async def keep(self) -> None:
        """Renews until cancelled. Raises only what `on_renewed` raises beyond `EtcdUnavailable`."""
        pauses = backoff_s()
        while True:
            try:
                await self._renew()
                await self._on_renewed()
                pauses = backoff_s()
                pause_s = self.ttl_s / 3
            except EtcdLeaseNotFound as error:
                logger.warning("%s: taking a new one", error)
                self.id, pause_s = 0, 0.0
            except EtcdUnavailable as error:
                if not self._is_outage:
                    logger.warning("%s", error)
                self._is_outage = True
                pause_s = min(next(pauses), self.ttl_s / 3)
            await asyncio.sleep(pause_s)

    def is_held(self) -> bool:
        """Whether it is certain that others still see our keys."""
        return self.id != 0 and time.monotonic() - self._renewed_at_s < self.ttl_s

    def settled_at_s(self) -> float:
        """The (monotonic) time from which the absence of other members' keys means that they are gone.

        Their leases suffer from the same outage as ours; so after an outage (or a time in which this process
        was not scheduled) everybody has one full time to live to come back. A lease that is new, the first one
        too, tells nothing of the time before it: there may just have been an outage.
        """
        now_s = time.monotonic()
        is_uncertain = self._is_outage or self._is_overdue(now_s)
        return (now_s if is_uncertain else self._held_since_s) + self.ttl_s

    async def revoke(self) -> None:
        """Ends the lease, its keys vanish at once. Best effort: without etcd it lapses by itself."""
        if self.id:
            try:
                await self._client.revoke_lease(self.id, REVOKE_DEADLINE_S)
            except EtcdError as error:
                logger.info("lease not revoked: %s", error)
            self.id = 0

    async def _renew(self) -> None:
        sent_at_s = time.monotonic()
        if self.id == 0:
            await self.grant()
        else:
            await self._client.keep_lease(self.id, self.ttl_s / 3)
        if self._is_outage or self._is_overdue(sent_at_s):
            self._held_since_s = time.monotonic()
        self._is_outage = False
        self._renewed_at_s = sent_at_s

    def _is_overdue(self, now_s: float) -> bool:
        return now_s - self._renewed_at_s > self.ttl_s * 2 / 3
