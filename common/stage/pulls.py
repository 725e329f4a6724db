"""Replicas on their way back: a stage copies its layers out of a cache store's pool and checks them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from common.kv.arrival import pool_checksum
from common.kv.checksum import SpanBinding
from common.kv.errors import LinkError
from common.kv.geometry import plan_copies
from common.kv.link import Link, close_reading, open_link
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.staging import copy_in, landing_pool
from common.membership import MemberRecord
from common.replica_messages import Pull, Pulled, replica_key
from common.stage.repeats import Answers
from dejavu.errors import ProtocolError

logger = logging.getLogger(__name__)


class Pulls:
    """Pulls into one pool, which is stage `stage_index`'s. Copies and checks run in `executor`; `on_done` is called on
    the event loop."""

    def __init__(self, pool: KvPool, executor: Executor, stage_index: int, on_done: Callable[[Pulled], None]) -> None:
        self.received_bytes = 0
        self._pool = pool
        self._executor = executor
        self._stage_index = stage_index
        self._answers = Answers[Pulled]()
        self._on_done = on_done
        self._offers: dict[str, GrantOffer] = {}
        self._links: dict[str, Link] = {}
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def store_joined(self, store: MemberRecord) -> None:
        """A store that may be pulled from; the way is opened ahead."""
        try:
            offer = GrantOffer.decode(str(store.detail.get("kv_offer", "")))
        except ProtocolError as error:
            logger.warning("%s: %s", store.name, error)
            return
        if self._offers.get(store.name) != offer:
            await self.store_lost(store.name)
            self._offers[store.name] = offer

    async def store_lost(self, name: str) -> None:
        self._offers.pop(name, None)
        link = self._links.pop(name, None)
        if link is not None:
            await close_reading(link, name)

    def start(self, pull: Pull) -> None:
        """Begins a pull; one that was asked for before is not begun twice, but answered again when it is over."""
        key = pull.epoch, pull.number
        if not self._answers.begin(key):
            answer = self._answers.of(key)
            if answer is not None:
                self._on_done(answer)
            return
        task = asyncio.get_running_loop().create_task(self._run(pull))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Returns when none is under way: nothing of ours writes to the pool any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self) -> None:
        await self.idle()
        for name in list(self._offers):
            await self.store_lost(name)

    async def _run(self, pull: Pull) -> None:
        try:
            intact = await self._copy(pull)
        except (LinkError, ValueError) as error:
            logger.warning("pulling %s from %s: %s", pull.sequence_id, pull.store, error)
            intact = False
        except Exception:
            # the driver waits for an answer, whatever it is
            logger.exception("pulling %s from %s", pull.sequence_id, pull.store)
            intact = False
        answer = Pulled(pull.epoch, pull.sequence_id, pull.attempt, intact, self._stage_index, pull.number)
        self._answers.give((pull.epoch, pull.number), answer)
        self._on_done(answer)

    async def _copy(self, pull: Pull) -> bool:
        link, offer = await self._link(pull.store)
        layers, token_range = self._pool.layout.layers, (0, pull.num_tokens)
        run: Callable[..., Awaitable[Any]] = functools.partial(
            asyncio.get_running_loop().run_in_executor, self._executor
        )
        landing: KvPool = self._pool
        blocks: Sequence[int] = pull.blocks
        if not self._pool.is_host:
            landing, blocks = await run(landing_pool, self._pool, pull.num_tokens)
        plan = plan_copies(offer.layout, pull.store_blocks, landing.layout, blocks, token_range, layers)
        try:
            await link.read(landing, plan)
        except LinkError:
            await self._drop(pull.store, link)
            raise
        self.received_bytes += plan.total_bytes
        if await run(_layer_checksums, landing, blocks, pull) != pull.checksums:
            logger.warning("the replica of %s in %s is damaged", pull.sequence_id, pull.store)
            return False
        if landing is not self._pool:
            await run(copy_in, landing, self._pool, pull.blocks)
        return True

    async def _drop(self, store: str, link: Link) -> None:
        """A link that has failed once fails for ever; the next pull opens another."""
        if self._links.get(store) is link:
            del self._links[store]
            await close_reading(link, store)

    async def _link(self, store: str) -> tuple[Link, GrantOffer]:
        """Raises `LinkError`; `ValueError` for a store that is gone."""
        async with self._opening:
            offer = self._offers.get(store)
            if offer is None:
                raise ValueError(f"{store} is not there")
            if store not in self._links:
                self._links[store] = await open_link(offer, self._pool, executor=self._executor)
            return self._links[store], offer


def _layer_checksums(pool: KvPool, blocks: Sequence[int], pull: Pull) -> list[int]:
    layout, key = pool.layout, replica_key(pull.sequence_id)
    bindings = (
        SpanBinding(layout.fingerprint, key, (layer, layer + 1), (0, pull.num_tokens), pull.token_hash)
        for layer in range(*layout.layers)
    )
    return [pool_checksum(pool, blocks, binding) for binding in bindings]
