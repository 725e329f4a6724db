"""A store reads real pools, and stages pull from it: two stages, other block sizes, damage."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch

from common.kv.checksum import hash_tokens
from common.kv.geometry import span_slots
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.staging import copy_in
from common.membership import MemberRecord, PipelineRecord
from common.messages import pack_ids
from common.replica_messages import HeldReplica, Pull, ReplicaItem
from common.stage.pulls import Pulls
from services.cache_store.keeper import Keeper
from services.cache_store.shelf import Shelf
from tests.unit.kv.link_ends import only
from tests.unit.kv.processes import BIG, owner

NUM_LAYERS = 5
CUT = 2
TOKENS = list(range(100, 400))
KEY = "request/0"


def layout(first: int, last: int, num_blocks: int, block_size: int) -> PoolLayout:
    return PoolLayout(first, last, num_blocks, block_size, 2, 8, "float32", "model")


def member(name: str, role: str, offer: str) -> MemberRecord:
    return MemberRecord(
        name, role, "1", 1, "h", "tcp://127.0.0.1:1", None, None, None, None, "active", {"kv_offer": offer}
    )


@dataclass
class Ends:
    """Two stages with random KV, a store, and fresh pools that pull from it."""

    stages: list[KvPool]
    keeper: Keeper
    store_pool: KvPool
    store: MemberRecord


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    stages = [KvPool.create(layout(a, b, 64, 8), name=f"stage-{a}") for a, b in ((0, CUT), (CUT, NUM_LAYERS))]
    draws = np.random.default_rng(3)
    for stage in stages:
        stage.memory[:] = draws.integers(0, 256, len(stage.memory), dtype=np.uint8)
    store_pool = KvPool.create(layout(0, NUM_LAYERS, 40, 16), name="store")
    servers = [await PoolServer.start(pool, "127.0.0.1", "1") for pool in (*stages, store_pool)]
    keeper = Keeper(store_pool, Shelf(40, 16))
    members = tuple(member(f"s{i}", "token_stage", server.offer.encode()) for i, server in enumerate(servers[:2]))
    await keeper.connect(PipelineRecord("token-0", "token_stage", 1, members))
    try:
        yield Ends(stages, keeper, store_pool, member("store", "cache_store", servers[2].offer.encode()))
    finally:
        await keeper.aclose()
        for server in servers:
            await server.aclose()


def item(start: int, end: int, blocks: list[int]) -> ReplicaItem:
    table = blocks[start // 8 : -(-end // 8)]
    return ReplicaItem(KEY, start, end - start, table, pack_ids(TOKENS[start : end + 1]))


def tokens_of(pool: KvPool, blocks: list[int], num_tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[plane][token][byte]"""
    slots = span_slots(pool.layout, blocks, (0, num_tokens), pool.layout.layers, pool.layout.heads)
    planes = pool.memory.reshape(2 * pool.layout.num_layers, -1, pool.layout.slot_bytes)
    return planes[:, slots]


def a_pull(pool: KvPool, held: HeldReplica) -> Pull:
    """Of everything, into blocks 3, 4, ..."""
    token_hash = hash_tokens(pack_ids(TOKENS[: held.num_tokens]))
    own = list(range(3, 3 + -(-held.num_tokens // 8)))
    checksums = held.checksums[slice(*pool.layout.layers)]
    return Pull(1, f"{KEY}/t", 1, "store", held.num_tokens, held.blocks, own, token_hash, checksums)


async def pull(ends: Ends, held: HeldReplica, index: int) -> tuple[KvPool, bool]:
    """A fresh stage pulls the replica into blocks 3, 4, ..."""
    pool = KvPool.create(ends.stages[index].layout, name="fresh")
    done: list[bool] = []
    with ThreadPoolExecutor(1) as executor:
        pulls = Pulls(pool, executor, 0, lambda pulled: done.append(pulled.intact))
        await pulls.store_joined(ends.store)
        pulls.start(a_pull(pool, held))
        await pulls.aclose()
    return pool, done[0]


async def test_what_stages_pull_is_what_the_store_read() -> None:
    blocks = [int(block) for block in np.random.default_rng(5).permutation(64)[:38]]
    async with ends() as found:
        assert found.keeper.links() == {"stage-0": "shm", "stage-2": "shm"}
        for start, end in ((0, 117), (117, 118), (118, 121), (121, 299)):
            assert await found.keeper.keep("token-0", [item(start, end, blocks)]) == []
        held = found.keeper.held(KEY, pack_ids(TOKENS))
        assert held is not None
        assert held.num_tokens == 299
        for index, stage in enumerate(found.stages):
            pool, intact = await pull(found, held, index)
            assert intact
            own = list(range(3, 41))
            assert np.array_equal(tokens_of(pool, own, 299), tokens_of(stage, blocks, 299))


async def test_damage_in_the_store_shows() -> None:
    blocks = list(range(38))
    async with ends() as found:
        assert await found.keeper.keep("token-0", [item(0, 299, blocks)]) == []
        held = found.keeper.held(KEY, pack_ids(TOKENS))
        assert held is not None
        offset = held.blocks[4] * found.store_pool.layout.slot_bytes * 16 + 5
        found.store_pool.memory[offset] ^= 1
        _, first = await pull(found, held, 0)
        _, second = await pull(found, held, 1)
        assert (first, second) == (False, True)


async def test_when_a_stage_is_lost_what_was_copied_before_stays() -> None:
    blocks = list(range(38))
    async with ends() as found:
        assert await found.keeper.keep("token-0", [item(0, 117, blocks)]) == []
        await found.keeper._sources["token-0"][1].link.aclose()
        assert await found.keeper.keep("token-0", [item(117, 299, blocks)]) == [KEY]
        held = found.keeper.held(KEY, pack_ids(TOKENS))
        assert held is not None and held.num_tokens == 117
        for index in (0, 1):
            _, intact = await pull(found, held, index)
            assert intact


async def test_a_link_that_broke_is_opened_again() -> None:
    blocks = list(range(38))
    async with ends() as found:
        assert await found.keeper.keep("token-0", [item(0, 117, blocks)]) == []
        await found.keeper._sources["token-0"][1].link.aclose()
        async with asyncio.timeout(5.0):
            while await found.keeper.keep("token-0", [item(117, 299, blocks)]):  # noqa: ASYNC110
                await asyncio.sleep(0)
        held = found.keeper.held(KEY, pack_ids(TOKENS))
        assert held is not None and held.num_tokens == 299


async def test_what_cannot_be_pulled_now_can_be_pulled_later() -> None:
    async with ends() as found:
        assert await found.keeper.keep("token-0", [item(0, 299, list(range(38)))]) == []
        held = found.keeper.held(KEY, pack_ids(TOKENS))
        assert held is not None
        done: list[bool] = []
        pool = KvPool.create(found.stages[0].layout, name="fresh")
        with ThreadPoolExecutor(1) as executor:
            pulls = Pulls(pool, executor, 0, lambda pulled: done.append(pulled.intact))
            await pulls.store_joined(found.store)
            for number, is_broken in enumerate((False, True, False)):
                if is_broken:
                    await pulls._links["store"].aclose()
                asked = msgspec.structs.replace(a_pull(pool, held), number=number)
                pulls.start(asked)
                await pulls.idle()
            await pulls.aclose()
            assert done == [True, False, True]
            pulls.start(asked)
        assert done == [True, False, True, True], "an answer that was lost is given again, and nothing copied"


async def test_a_stage_that_does_not_answer_is_not_waited_for_once_its_epoch_is_over() -> None:
    store_pool = KvPool.create(BIG, name="store")
    keeper = Keeper(store_pool, Shelf(BIG.num_blocks, BIG.block_size))
    with owner() as (process, offer):
        stage = member("s", "token_stage", only("zmq", offer).encode())
        await keeper.connect(PipelineRecord("token-0", "token_stage", 1, (stage,)))
        process.freeze()
        wanted = ReplicaItem(KEY, 0, 299, list(range(19)), pack_ids(TOKENS))
        keeping = asyncio.create_task(keeper.keep("token-0", [wanted]))
        await asyncio.sleep(0)
        assert not keeping.done()
        async with asyncio.timeout(1.0):  # the link itself would wait for five
            await keeper.disconnect("token-0")
            assert await keeping == [KEY]
    assert keeper.held(KEY, pack_ids(TOKENS)) is None


async def test_what_does_not_fit_is_refused_and_leaves_nothing() -> None:
    blocks = list(range(38))
    async with ends() as found:
        many = [ReplicaItem(f"r{i}/0", 0, 299, blocks, pack_ids(TOKENS)) for i in range(3)]
        assert await found.keeper.keep("token-0", many) == ["r2/0"]
        assert await found.keeper.keep("token-0", [ReplicaItem("r0/0", 400, 1, [0], b"")]) == ["r0/0"]
        assert await found.keeper.keep("nobody", [item(0, 8, blocks)]) == [KEY]
        assert found.keeper.held("r2/0", pack_ids(TOKENS)) is None


def test_a_store_never_loads_torch() -> None:
    probe = "import sys, services.cache_store.service as s; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def check_copy_in(device: str) -> None:
    staged = KvPool.create(layout(0, 3, 4, 8))
    staged.memory[:] = np.random.default_rng(1).integers(0, 256, len(staged.memory), dtype=np.uint8)
    pool = KvPool.create(layout(0, 3, 16, 8), device)
    copy_in(staged, pool, [9, 2, 5, 11, 7])
    for local_layer in range(3):
        for source, to in zip(staged.layer(local_layer), pool.layer(local_layer), strict=True):
            assert torch.equal(source.view(torch.int32), to[[9, 2, 5, 11]].cpu().view(torch.int32))


def test_landed_blocks_reach_their_places() -> None:
    check_copy_in("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_landed_blocks_reach_a_device() -> None:
    check_copy_in("cuda")
