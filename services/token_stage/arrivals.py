"""What prompt stages have written into a token stage's pool is verified before anybody counts on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future

from common.handoff_messages import KvArrived, KvConfirmed
from common.kv.arrival import verify_arrival
from common.kv.pool import KvPool

logger = logging.getLogger(__name__)


class Arrivals:
    """Verifies in `executor`; `on_done(confirmed)` is called on the event loop, in the order of arrival."""

    def __init__(self, pool: KvPool, executor: Executor, on_done: Callable[[KvConfirmed], None]) -> None:
        self.received_bytes = 0
        self.num_corrupt = 0
        self._pool = pool
        self._executor = executor
        self._on_done = on_done
        self._loop = asyncio.get_running_loop()

    def verify(self, arrived: KvArrived) -> None:
        """Begins to verify a hand-off."""
        future = self._executor.submit(verify_arrival, self._pool, arrived)
        future.add_done_callback(lambda done: self._hand_over(arrived, done))

    def _hand_over(self, arrived: KvArrived, done: Future[bool]) -> None:
        if not done.cancelled():
            self._loop.call_soon_threadsafe(self._verified, arrived, done.result())

    def _verified(self, arrived: KvArrived, intact: bool) -> None:
        num_layers = arrived.layers[1] - arrived.layers[0]
        self.received_bytes += self._pool.layout.bytes_per_token_layer * arrived.num_tokens * num_layers
        if not intact:
            self.num_corrupt += 1
            logger.warning("corrupt KV for %s, attempt %d", arrived.sequence_id, arrived.attempt)
        self._on_done(
            KvConfirmed(
                arrived.epoch,
                arrived.sequence_id,
                arrived.attempt,
                arrived.layers,
                arrived.start,
                arrived.num_tokens,
                intact,
            )
        )

    def stats(self) -> dict[str, int]:
        """For `status`."""
        return {"received_bytes": self.received_bytes, "corrupt": self.num_corrupt}
