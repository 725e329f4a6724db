"""A cache store whose lease has lapsed and that comes back with the same memory: its copies are still there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np

from common.channel import Inbox
from common.etcd.client import EtcdClient, KeyValue, is_absent
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.membership import MemberRecord, Membership, PipelineRecord, member_key
from common.messages import Message, decode_stage_inbox, pack_ids
from common.model.kv_layout import fitting_layout
from common.model.spec import load_spec
from common.peers import Peers
from common.replica_messages import Claim, Claimed, Locate, Located, ReplicaItem, Replicate, Replicated
from deploy.etcd_server import EtcdServer
from services.cache_store.service import CacheStore, StoreOptions
from tests.cluster.etcd_fixtures import own_etcd, shared_etcd
from tests.cluster.system import TINY

__all__ = ["own_etcd", "shared_etcd"]

STORE, PIPELINE, KEY = "cache-store-0", "token-0", "r/0"
IDS = list(range(1, 60))
MEMORY_BYTES = 1 << 20
LIMIT_S = 15.0


class Driver:
    """The only stage of a token pipeline: a pool with KV in it, and whatever a store answers."""

    def __init__(self) -> None:
        self.peers = Peers("token-0-stage-0.1")
        self.inbox: Inbox
        self.epoch = 0
        self._heard: asyncio.Queue[Message] = asyncio.Queue()

    def on_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        self._heard.put_nowait(decode_stage_inbox(frames[0]))

    async def ask(self, message: Message) -> Message:
        """A store's next answer."""
        self.peers.send(STORE, message)
        async with asyncio.timeout(LIMIT_S):
            return await self._heard.get()

    async def replicate(self, batch: int, start: int, end: int) -> None:
        item = ReplicaItem(KEY, start, end - start, [start // 16], pack_ids(IDS[start:end]))
        answer = await self.ask(Replicate(PIPELINE, self.epoch, batch, [item]))
        assert answer == Replicated(STORE, self.epoch, batch, [])

    async def replicate_until_it_counts(self, batch: int, start: int) -> int:
        """Token by token; the end of what the store then has."""
        for position in range(start, len(IDS)):
            await self.replicate(batch + position - start, position, position + 1)
            if await self.num_held() == position + 1:
                return position + 1
            await asyncio.sleep(LIMIT_S / len(IDS))
        raise AssertionError("the store still doubts what it has read")

    async def num_held(self) -> int:
        answer = await self.ask(Locate(PIPELINE, self.epoch, f"{KEY}/t", 1, pack_ids(IDS)))
        assert isinstance(answer, Located)
        return 0 if answer.held is None else answer.held.num_tokens


@asynccontextmanager
async def driver(url: str, cluster: str) -> AsyncIterator[Driver]:
    """Registered and published, so that a store reads from it."""
    spec = load_spec(TINY, "float32")
    pool = KvPool.create(fitting_layout(spec, (0, spec.num_layers), 16, MEMORY_BYTES), name="token-0-stage-0")
    pool.memory[:] = np.random.default_rng(0).integers(0, 256, len(pool.memory), dtype=np.uint8)
    server, found = await PoolServer.start(pool, "127.0.0.1", "1"), Driver()
    found.inbox = await Inbox.bind("tcp://127.0.0.1:*", found.on_frames)
    record = MemberRecord(
        "token-0-stage-0", "token_stage", "1", os.getpid(), "h", found.inbox.endpoint, PIPELINE, 0, 1,
        (0, spec.num_layers), "active", {"kv_offer": server.offer.encode()},
    )  # fmt: skip
    try:
        async with EtcdClient(url) as client, Membership(client, cluster) as membership:
            await membership.register(record)
            published = PipelineRecord(PIPELINE, "token_stage", 0, (record,))
            found.epoch = await membership.publish_pipeline(published, is_absent("/nobody")) or 0
            yield found
    finally:
        found.peers.close()
        found.inbox.close()
        await server.aclose()
        pool.close()


@asynccontextmanager
async def store(url: str, cluster: str) -> AsyncIterator[None]:
    options = StoreOptions(
        STORE, url, cluster, "127.0.0.1", str(TINY), "float32", MEMORY_BYTES, 16, 0, Path("unused")
    )  # fmt: skip
    stop = asyncio.Event()
    serving = asyncio.create_task(CacheStore.serve(options, stop))
    try:
        yield
    finally:
        stop.set()
        await serving


async def registered(client: EtcdClient, cluster: str, *, but_not_on: int = 0) -> KeyValue:
    """The store's record, on another lease than this one."""
    async with asyncio.timeout(LIMIT_S):
        async for _ in client.watch_prefix(member_key(cluster, STORE), 1):
            found = await client.get(member_key(cluster, STORE))
            if found is not None and found.lease_id != but_not_on:
                return found
    raise AssertionError("a watch never ends")


async def test_the_copies_of_a_store_outlive_its_lease(shared_etcd: EtcdServer) -> None:
    url, cluster = shared_etcd.url, "lapse"
    async with driver(url, cluster) as ours, store(url, cluster), EtcdClient(url) as client:
        before = await registered(client, cluster)
        await ours.peers.connect(STORE, msgspec.json.decode(before.value, type=MemberRecord).endpoint)
        assert await ours.ask(Claim(PIPELINE, ours.epoch)) == Claimed(STORE, PIPELINE, ours.epoch, [])
        await ours.replicate(1, 0, 16)
        await ours.replicate(2, 16, 32)
        await ours.replicate(2, 16, 32)  # asked once more: it cannot know that the answer has arrived
        await client.revoke_lease(before.lease_id)
        again = await registered(client, cluster, but_not_on=before.lease_id)
        assert msgspec.json.decode(again.value) == msgspec.json.decode(before.value), "the same incarnation"

        # were it another driver that asks, nobody could tell whose blocks the last batch was read from
        assert await ours.num_held() == 16
        # but it lives, and goes on; all of it counts once the store has seen that others know it again
        end = await ours.replicate_until_it_counts(3, 32)

        # where it has let go of the store, it begins anew
        answer = await ours.ask(Claim(PIPELINE, ours.epoch, 99))
        assert answer == Claimed(STORE, PIPELINE, ours.epoch, [KEY])
        assert await ours.num_held() == end - 1
