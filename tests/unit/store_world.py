"""A cache store as it is served, on a simulated disk and a virtual clock, and a token driver that has its KV copied.

What is sent arrives in order, a little later. The KV of a token depends on all ids up to there, so whatever comes back
can be checked byte by byte."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
import random
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.kv.checksum import SpanBinding, hash_tokens, span_checksum
from common.kv.copies import copy_pieces
from common.kv.errors import LinkLost, LinkTimeout
from common.kv.geometry import CopyPlan, span_slots
from common.kv.layout import PoolLayout
from common.kv.offer import GrantOffer
from common.kv.pool import Bytes, KvPool
from common.kv.token_ids import ID_BYTES
from common.membership import MemberRecord, PipelineRecord
from common.messages import Message, pack_ids
from common.model.spec import load_spec
from common.peers import Peers
from common.replica_messages import Claimed, HeldReplica, Located, Replicated
from services.cache_store import keeper as keeper_module
from services.cache_store.service import CacheStore, StoreOptions
from tests.unit.simulated_disk import SimulatedDisk, put_in_place

NUM_LAYERS = 2
BLOCK_SIZE, STORE_BLOCK_SIZE = 4, 8
NUM_STAGE_BLOCKS = 400
SLOT_BYTES = 16
SPEC = dataclasses.replace(
    load_spec("models/tiny", "float32"), num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=SLOT_BYTES // 4
)
STORE = "store-0"
PIPELINE = "token-0"
DRIVER = "token-0-0"


def kv_of(tokens: list[int]) -> Bytes:
    """What the caches hold, [token][plane][byte]."""
    row = b""
    rows = [row := hashlib.blake2b(row + token.to_bytes(4, "little")).digest() for token in tokens]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 2 * NUM_LAYERS, SLOT_BYTES)


class StorePeers(Peers):
    """What the store says to the driver waits in the world."""

    def __init__(self, world: StoreWorld) -> None:
        super().__init__(STORE)
        self.is_dead = False
        self._world = world

    async def connect(self, name: str, endpoint: str) -> None:
        pass

    def send(self, name: str, message: Message, payload: object = None) -> bool:
        if not self.is_dead:
            self._world.from_store.append(message)
        return True


class StageLink:
    """The store's way into a stage's pool: slow, broken now and then, and over once it is closed."""

    name = "simulated"

    def __init__(self, world: StoreWorld, stage: KvPool) -> None:
        self._world = world
        self._stage = stage
        self._closed = asyncio.Event()

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        draws = self._world.draws
        delay_s = 5.0 if draws.random() < self._world.link_failure_rate else draws.uniform(0.0, 0.01)
        try:
            await asyncio.wait_for(self._closed.wait(), delay_s)
        except TimeoutError:
            if delay_s == 5.0:
                raise LinkTimeout("simulated") from None
            copy_pieces(plan, self._stage.memory, destination.memory)
            return
        raise LinkLost("simulated")

    async def aclose(self) -> None:
        self._closed.set()


class StoreLife:
    """A process of the store, from its start to its end. What it is made of is what is served; only its membership
    and its sockets are the world's."""

    def __init__(self, world: StoreWorld) -> None:
        options = StoreOptions(
            STORE, "", "c", "h", "", "float32", world.store_bytes, STORE_BLOCK_SIZE, world.disk_bytes,
            world.disk.path(),
        )  # fmt: skip
        self.store = CacheStore(options, SPEC)
        self.peers = self.store._peers = StorePeers(world)
        self.records: asyncio.Queue[PipelineRecord] = asyncio.Queue()
        self.standing = 1
        """as whom others know it"""
        membership = SimpleNamespace(standing=lambda: self.standing, watch_pipelines=self._watch)
        self.store._membership = membership  # type: ignore[assignment]
        self.tasks: list[asyncio.Task[None]] = []

    async def _watch(self) -> Any:
        while True:
            yield await self.records.get()

    async def start(self) -> None:
        await self.store._open_disk()
        if self.peers.is_dead:
            return
        store = self.store
        works = [store._watch_pipelines(), store._work(), store._recall(), store._sweep()]
        if store._disk is not None:
            works.append(store._disk.run())
        self.tasks = [asyncio.create_task(work) for work in works]

    def check(self) -> None:
        """Whether everything in it runs. Raises what has ended it."""
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()
                raise AssertionError("a part of the store has ended")

    def on_disk(self) -> dict[str, bytes]:
        """Ids of the tokens that it takes for being on disk, by key."""
        replicas = self.store._shelf.replicas
        found = {key: replica.token_ids[: replica.num_on_disk * ID_BYTES] for key, replica in replicas.items()}
        return found if self.store._disk is not None else {}

    def end(self) -> None:
        self.peers.is_dead = True
        for task in self.tasks:
            task.cancel()

    async def stop(self) -> None:
        """In order."""
        self.end()
        await asyncio.wait(self.tasks)
        await self.store._close_disk()


class StoreWorld:
    """`life` is the store's present process, if there is one; `promised` what the last one had on disk."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.draws = random.Random(seed)
        self.store_bytes = self.draws.choice([16, 64]) * STORE_BLOCK_SIZE * 2 * NUM_LAYERS * SLOT_BYTES
        self.disk_bytes = self.draws.choice([60_000, 1 << 20])
        self.max_disk_bytes = self.draws.choice([90_000, 1 << 20])
        self.disk = SimulatedDisk(self.draws, self.max_disk_bytes)
        self.disk.on_cut = lambda: self.lose_store(power_is_cut=self.cuts_power)
        self.cuts_power = True
        self.link_failure_rate = 0.0
        self.life: StoreLife | None = None
        self.starts_at_s = math.inf
        self.promised: dict[str, bytes] = {}
        self.from_store: deque[Message] = deque()
        self.to_store: deque[Message] = deque()
        self.lost: list[str] = []
        """deaths that the driver has not heard of"""
        self.texts: dict[str, list[list[int]]] = {}
        """all that was ever under a key"""
        self.num_found = self.num_held = 0
        self.epoch = 0
        put_in_place(self.disk, patch)
        patch.setattr(keeper_module, "open_link", self._open_link)
        layouts = [
            PoolLayout(n, n + 1, NUM_STAGE_BLOCKS, BLOCK_SIZE, 1, 4, "float32", SPEC.fingerprint) for n in (0, 1)
        ]
        self.stages = [KvPool.create(layout, name=f"stage-{n}") for n, layout in enumerate(layouts)]

    @property
    def now_s(self) -> float:
        return time.monotonic()

    @property
    def is_served(self) -> bool:
        return self.life is not None and bool(self.life.tasks)

    def heal(self) -> None:
        """Disk and links work again."""
        self.disk.failure_rate = self.disk.hang_rate = self.link_failure_rate = 0.0
        self.disk.max_bytes = self.max_disk_bytes
        self.disk.cut_in = None

    def close(self) -> None:
        for pool in self.stages + ([] if self.life is None else [self.life.store._pool]):
            pool.close()

    # ------------------------------------------------------------ the token pipeline's pools

    async def _open_link(self, offer: GrantOffer, pool: KvPool) -> StageLink:
        await asyncio.sleep(0.001)
        return StageLink(self, self.stages[int(offer.name)])

    def record(self) -> PipelineRecord:
        offers = [
            GrantOffer(str(index), "1", stage.layout, "h", "tcp://h:1", b"") for index, stage in enumerate(self.stages)
        ]
        stages = tuple(
            MemberRecord(
                f"{PIPELINE}-{index}", "token_stage", "1", 1, "h", "tcp://h:1", PIPELINE, index, len(offers),
                (index, index + 1), "active", {"kv_offer": offer.encode()},
            )
            for index, offer in enumerate(offers)
        )  # fmt: skip
        return PipelineRecord(PIPELINE, "token_stage", self.epoch, stages)

    def compute(self, tokens: list[int], blocks: list[int], start: int) -> None:
        """The KV of all tokens from `start` on is in the stages' pools."""
        rows = kv_of(tokens)
        for index, stage in enumerate(self.stages):
            slots = span_slots(stage.layout, blocks, (start, len(tokens)), stage.layout.layers, stage.layout.heads)
            planes = stage.memory.reshape(2, -1, SLOT_BYTES)
            planes[:, slots] = rows[start:, 2 * index : 2 * index + 2].transpose(1, 0, 2)

    # ------------------------------------------------------------ the store

    async def start_store(self) -> None:
        """Whatever the last process had on disk is there, if the disk did not lose it by itself."""
        self.starts_at_s = math.inf
        self.life = life = StoreLife(self)
        await life.start()
        if self.life is not life:
            return  # dead already
        life.records.put_nowait(self.record())
        store, promised = life.store, self.promised
        if store._disk is None:
            return
        for key, replica in store._shelf.replicas.items():
            ids = replica.token_ids
            assert any(pack_ids(text).startswith(ids) for text in self.texts[key]), "nobody ever kept this"
            self.num_found += 1
        for key, ids in {} if self.disk.num_rotten else promised.items():
            found = store._shelf.replicas.get(key)
            assert not ids or (found is not None and found.token_ids.startswith(ids)), f"{key} was on disk and is lost"
        self.promised = {}

    def lose_store(self, *, power_is_cut: bool) -> None:
        if self.life is None:
            return
        if self.life.tasks:
            self.promised = self.life.on_disk()
        self.life.end()
        self.forget_store(power_is_cut=power_is_cut)

    def forget_store(self, *, power_is_cut: bool) -> None:
        """It is gone, whatever the way."""
        assert self.life is not None
        self.life.store._pool.close()
        self.life = None
        self.disk.end_process(power_is_cut=power_is_cut)
        self.from_store.clear()
        self.to_store.clear()
        self.lost.append(STORE)
        self.starts_at_s = self.now_s + self.draws.uniform(0.5, 2.0)

    async def stop_store(self) -> None:
        """In order: all that is kept is on disk, unless that fails or takes too long."""
        life = self.life
        assert life is not None
        await life.stop()
        if self.life is life:
            self.promised = life.on_disk()
            self.forget_store(power_is_cut=False)

    # ------------------------------------------------------------ what comes back

    def check_held(self, key: str, tokens: list[int], held: HeldReplica) -> None:
        """What a stage would copy now is the KV of these tokens, and its checksums say so."""
        assert self.life is not None
        pool = self.life.store._pool
        count, layout = held.num_tokens, pool.layout
        slots = span_slots(layout, held.blocks, (0, count), layout.layers, layout.heads)
        planes = pool.memory.reshape(2 * NUM_LAYERS, -1, SLOT_BYTES)
        assert np.array_equal(planes[:, slots].transpose(1, 0, 2), kv_of(tokens[:count])), f"{key} diverges"
        token_hash = hash_tokens(pack_ids(tokens[:count]))
        for layer in range(NUM_LAYERS):
            binding = SpanBinding(layout.fingerprint, key, (layer, layer + 1), (0, count), token_hash)
            assert span_checksum(pool.memory, layout, held.blocks, binding) == held.checksums[layer]
        self.num_held += 1

    def deliver(self, message: Message) -> bool:
        """Of the messages that this world knows; False: it is of an epoch that is over."""
        assert isinstance(message, Claimed | Replicated | Located)
        return message.epoch == self.epoch

    async def turn(self, pause_s: float) -> None:
        """Time passes: messages reach the store, and it may start, or be found to have failed."""
        if self.now_s >= self.starts_at_s:
            await self.start_store()
        if self.life is not None and self.life.tasks:
            self.life.check()
            while self.to_store:
                self.life.store._queue.put_nowait((DRIVER, self.to_store.popleft()))  # type: ignore[arg-type]
        await asyncio.sleep(pause_s)
