from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
import torch

from common.kv.arrival import Arrival, verify_arrival
from common.kv.checksum import hash_tokens
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.lane import HandoffSpan, Job, together
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer
from common.kv.offer import host_id
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.staging import HostStaging
from common.kv.stream import HandoffWriter
from tests.unit.kv.processes import BIG, owner, until
from tests.unit.kv.reference import layout

KINDS = ["shm", "zmq"]
PROMPT = layout(first_layer=2, last_layer=8, num_blocks=16)
CUTS = [(0, 3), (3, 7), (7, 9)]
"""Layers of the token stages; the prompt stage has layers of each."""


@dataclass
class Scene:
    """One prompt stage, and a token pipeline that cuts the model and its blocks another way."""

    source: KvPool
    pools: list[KvPool]
    servers: list[PoolServer]
    offers: list[GrantOffer]
    writer: HandoffWriter
    arrivals: list[Arrival] = field(default_factory=list)

    def verified(self) -> list[bool]:
        return [verify_arrival(self.pools[arrival.stage_index], arrival) for arrival in self.arrivals]


@asynccontextmanager
async def scene(kind: str, timeout_s: float = 2.0) -> AsyncIterator[Scene]:
    source = random_pool(PROMPT)
    cuts = [layout(first_layer=first, last_layer=last, block_size=3, num_blocks=30) for first, last in CUTS]
    pools = [KvPool.create(cut, name=f"token-{index}") for index, cut in enumerate(cuts)]
    servers = [await PoolServer.start(pool, "127.0.0.1", "first") for pool in pools]
    host = host_id() if kind == "shm" else "elsewhere"
    offers = [msgspec.structs.replace(server.offer, host_id=host) for server in servers]
    arrivals: list[Arrival] = []
    async with AsyncExitStack() as stack:
        writer = await HandoffWriter.start(source, arrivals.append, timeout_s=timeout_s)
        stack.push_async_callback(writer.aclose)
        for server in servers:
            stack.push_async_callback(server.aclose)
        yield Scene(source, pools, servers, offers, writer, arrivals)


def random_pool(pool_layout: PoolLayout) -> KvPool:
    pool = KvPool.create(pool_layout, name="prompt")
    pool.memory[:] = np.random.default_rng(0).integers(0, 256, len(pool.memory), dtype=np.uint8)
    return pool


def span(tokens: tuple[int, int] = (5, 30), sequence_id: str = "r/0", blocks: Sequence[int] = range(10)) -> HandoffSpan:
    return HandoffSpan(sequence_id, 1, "token-0", tokens, [9, 8, 0, 1, 2, 3, 4, 5], blocks, hash_tokens(b"ids"))


async def drained(writer: HandoffWriter, sequence_id: str = "r/0") -> LinkError | None:
    async with asyncio.timeout(10.0):
        return await asyncio.wrap_future(writer.drain(sequence_id, 1))


@pytest.mark.parametrize("kind", KINDS)
async def test_layers_arrive_where_they_belong(kind: str) -> None:
    async with scene(kind) as s:
        await s.writer.connect("token-0", s.offers)
        assert s.writer.links("token-0") == [kind] * 3
        one, two = span(), span((0, 7), "r/1", range(20, 23))
        for layer in range(6):
            s.writer.submit(one, layer)
            s.writer.submit(two, layer)
        assert await drained(s.writer) is None and await drained(s.writer, "r/1") is None
        assert all(s.verified())
        cells = {
            (arrival.sequence_id, layer, arrival.stage_index)
            for arrival in s.arrivals
            for layer in range(*arrival.layers)
        }
        owners = {2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 2}
        assert cells == {(name, layer, at) for name in ("r/0", "r/1") for layer, at in owners.items()}
        assert sum(arrival.num_tokens * (arrival.layers[1] - arrival.layers[0]) for arrival in s.arrivals) == 32 * 6
        assert s.writer.sent_bytes == 32 * 6 * PROMPT.bytes_per_token_layer


@pytest.mark.parametrize("kind", KINDS)
async def test_damage_is_found(kind: str) -> None:
    async with scene(kind) as s:
        await s.writer.connect("token-0", s.offers)
        s.writer.submit(span(), 0)
        await drained(s.writer)
        [arrival] = s.arrivals
        assert verify_arrival(s.pools[0], arrival)
        s.pools[0].layer(2)[1][7, 1, 0, 3] += 1
        assert not verify_arrival(s.pools[0], arrival)
        # and what the pool cannot hold is not intact either
        assert not verify_arrival(s.pools[1], arrival)


async def test_small_layers_are_handed_over_together() -> None:
    async with scene("shm") as s:
        await s.writer.connect("token-0", s.offers)
        one = span()
        for layer in range(1, 5):
            s.writer.submit(one, layer)
        assert not s.arrivals  # nothing has been waited for, and nothing has been handed over
        s.writer.submit(one, 5)
        assert await drained(s.writer) is None
        assert sorted((arrival.stage_index, arrival.layers) for arrival in s.arrivals) == [(1, (3, 7)), (2, (7, 8))]
        assert all(s.verified())


async def test_jobs_wait_for_a_pipeline_that_is_about_to_be_connected() -> None:
    async with scene("shm") as s:
        for layer in range(6):
            s.writer.submit(span(), layer)
        await s.writer.connect("token-0", s.offers)
        assert await drained(s.writer) is None
        assert all(s.verified())


async def test_what_comes_for_a_forgotten_pipeline_fails_at_once() -> None:
    async with scene("shm", timeout_s=60.0) as s:
        await s.writer.connect("token-0", s.offers)
        await s.writer.connect("token-0", [])
        s.writer.submit(span(), 0)
        assert isinstance(await drained(s.writer), LinkLost)
        await s.writer.connect("token-0", s.offers)
        s.writer.submit(span(), 1)
        assert await drained(s.writer) is None


async def test_nobody_to_write_to() -> None:
    async with scene("shm", timeout_s=0.1) as s:
        s.writer.submit(span(), 0)
        assert isinstance(await drained(s.writer), LinkLost)
        await s.writer.connect("token-0", s.offers[:1])
        s.writer.submit(span(), 5)
        assert "no way to layer 7" in str(await drained(s.writer))
        assert not s.arrivals
        assert await drained(s.writer, "never submitted") is None


async def test_blocks_that_do_not_exist_are_the_sequence_s_own_failure() -> None:
    async with scene("shm") as s:
        await s.writer.connect("token-0", s.offers)
        bad, good = span(blocks=[0, 1, 99, 3, 4, 5, 6, 7, 8, 9]), span(sequence_id="r/1")
        s.writer.submit(bad, 0)
        s.writer.submit(good, 0)
        assert isinstance(await drained(s.writer), LinkRefused)
        assert await drained(s.writer, "r/1") is None
        assert [arrival.sequence_id for arrival in s.arrivals] == ["r/1"]


async def test_what_does_not_fit_is_refused_on_connecting() -> None:
    async with scene("shm") as s:
        foreign = msgspec.structs.replace(s.offers[0], layout=layout(fingerprint="other"))
        with pytest.raises(LinkRefused, match="model of prompt"):
            await s.writer.connect("token-0", [foreign])
        wider = msgspec.structs.replace(s.offers[0], layout=layout(num_kv_heads=4))
        with pytest.raises(LinkRefused, match="KV heads"):
            await s.writer.connect("token-0", [wider])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_replaced_stage_gets_a_new_link_and_the_others_keep_theirs(kind: str) -> None:
    async with scene(kind) as s:
        await s.writer.connect("token-0", s.offers)
        kept = s.writer._lanes["token-0"][0]
        await s.servers[1].aclose()
        s.writer.submit(span(), 1)
        assert isinstance(await drained(s.writer), LinkError)
        again = await PoolServer.start(s.pools[1], "127.0.0.1", "second")
        s.servers[1] = again
        offers = [s.offers[0], msgspec.structs.replace(again.offer, host_id=s.offers[0].host_id), s.offers[2]]
        await s.writer.connect("token-0", offers)
        assert s.writer._lanes["token-0"][0] is kept
        s.arrivals.clear()
        for layer in range(6):
            s.writer.submit(span(), layer)
        assert await drained(s.writer) is None
        assert all(s.verified()) and {arrival.stage_index for arrival in s.arrivals} == {0, 1, 2}
        await again.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_reset_nothing_old_is_written_and_new_work_goes_on(kind: str) -> None:
    async with scene(kind) as s:
        await s.writer.connect("token-0", s.offers, {"prompt-0": 1})
        for layer in range(6):
            s.writer.submit(span(), layer)
        await s.writer.reset({"prompt-0": 2})
        for server in s.servers:
            await server.fence({"prompt-0": 2})
        written = [pool.memory.copy() for pool in s.pools]
        s.source.memory[:] ^= 0xFF
        assert all(np.array_equal(pool.memory, before) for pool, before in zip(s.pools, written, strict=True))
        for layer in range(6):
            s.writer.submit(span(sequence_id="r/9"), layer)
        assert await drained(s.writer, "r/9") is None
        assert s.writer.links("token-0") == [kind] * 3
        newer = [arrival for arrival in s.arrivals if arrival.sequence_id == "r/9"]
        assert newer and all(verify_arrival(s.pools[arrival.stage_index], arrival) for arrival in newer)


async def test_closing_ends_everything_that_waits() -> None:
    async with scene("shm") as s:
        s.writer.submit(span(), 0)
        waiting = s.writer.drain("r/0", 1)
        await s.writer.aclose()
        assert isinstance(waiting.result(0), LinkLost)
        s.writer.submit(span(), 0)
        assert isinstance(await drained(s.writer), LinkLost)


async def test_a_frozen_stage_says_that_its_blocks_are_not_safe_and_delays_no_other() -> None:
    frozen_layout = msgspec.structs.replace(BIG, first_layer=4, last_layer=8)
    source = random_pool(msgspec.structs.replace(BIG, last_layer=8))
    with owner() as (process, offer):
        here = KvPool.create(frozen_layout, name="here")
        server = await PoolServer.start(here, "127.0.0.1", "first")
        arrivals: list[Arrival] = []
        first: asyncio.Event = asyncio.Event()

        def arrived(arrival: Arrival) -> None:
            arrivals.append(arrival)
            first.set()

        writer = await HandoffWriter.start(source, arrived, timeout_s=0.5)
        offers = [msgspec.structs.replace(one, host_id="elsewhere") for one in (offer, server.offer)]
        await writer.connect("token-0", offers)
        process.freeze()
        whole = HandoffSpan("r/0", 1, "token-0", (0, 512), range(32), range(32), b"")
        writer.submit(whole, 0)
        writer.submit(whole, 4)
        ending = writer.drain("r/0", 1)
        await first.wait()
        assert not ending.done() and arrivals[0].stage_index == 1
        error = await asyncio.wrap_future(ending)
        assert isinstance(error, LinkTimeout) and error.may_still_write
        assert [name.partition(">")[2] for name in error.unconfirmed] == [offer.name]
        await writer.aclose()
        await server.aclose()
        process.kill()


async def test_nobody_waits_for_a_frozen_stage_that_is_replaced() -> None:
    source = random_pool(BIG)
    with owner() as (process, offer):
        writer = await HandoffWriter.start(source, lambda arrival: None, timeout_s=60.0)
        await writer.connect("token-0", [msgspec.structs.replace(offer, host_id="elsewhere")])
        process.freeze()
        whole = HandoffSpan("r/0", 1, "token-0", (0, 512), range(32), range(32), b"")
        for layer in range(BIG.num_layers):
            writer.submit(whole, layer)
        [lane] = writer._lanes["token-0"]
        await until(lambda: lane._writing is not None)
        async with asyncio.timeout(5.0):
            await writer.connect("token-0", [])
            error = await drained(writer)
        assert isinstance(error, LinkLost) and error.may_still_write and error.unconfirmed
        process.kill()
        await writer.aclose()


def test_what_waits_together_is_written_together() -> None:
    pool = KvPool.create(PROMPT)
    one, two = span(), span((0, 7), "r/1")
    jobs = [Job(one, 4, None), Job(two, 2, None), Job(one, 2, None), Job(one, 3, None), Job(two, 4, None)]
    groups = [[(job.span is one, job.layer) for job in group] for group in together(jobs, pool)]
    assert groups == [[(True, 2), (True, 3), (True, 4)], [(False, 2)], [(False, 4)]]


@pytest.mark.parametrize("blocks", [[9, 8, 0, 1, 2], [3, 4, 5, 6, 7]])
def test_staged_blocks_are_a_pool_of_their_own(blocks: list[int]) -> None:
    pool = random_pool(PROMPT)
    check_staging(pool, pool, blocks)


def check_staging(pool: KvPool, expected: KvPool, blocks: list[int]) -> None:
    staging = HostStaging(pool)
    for _ in range(2):
        staged, table = staging.copy_out(blocks, (6, 18), (3, 6))
        assert staged.layout.layers == (3, 6)
        for position in range(6, 18):
            ours, theirs = blocks[position // 4], table[position // 4]
            for layer in range(3, 6):
                for side in range(2):
                    assert torch.equal(
                        expected.layer(layer - 2)[side][ours, position % 4].view(torch.uint8),
                        staged.layer(layer - 3)[side][theirs, position % 4].view(torch.uint8),
                    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
async def test_from_device_to_host_and_to_device(kind: str) -> None:
    expected = random_pool(PROMPT)
    source = KvPool.create(PROMPT, "cuda", name="prompt")
    source.arena.copy_(expected.arena)
    check_staging(source, expected, [9, 8, 0, 1, 2])
    for device in ("cpu", "cuda"):
        pool = KvPool.create(layout(last_layer=9, block_size=3, num_blocks=30), device, name="token")
        server = await PoolServer.start(pool, "127.0.0.1", "first")
        host = host_id() if kind == "shm" else "elsewhere"
        arrivals: list[Arrival] = []
        writer = await HandoffWriter.start(source, arrivals.append)
        await writer.connect("token-0", [msgspec.structs.replace(server.offer, host_id=host)])
        for layer in range(6):
            writer.submit(span(), layer)
        assert await drained(writer) is None
        assert arrivals and all(verify_arrival(pool, arrival) for arrival in arrivals)
        await writer.aclose()
        await server.aclose()


async def test_a_handshake_that_is_given_up_is_over_before_the_writer_is() -> None:
    """It goes on in its thread until the owner, who stands still, has not answered in time."""
    pool = random_pool(PROMPT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as owner_socket:
        owner_socket.bind(f"\0{secrets.token_hex(16)}")
        owner_socket.listen()
        address = owner_socket.getsockname()[1:].decode()
        offer = GrantOffer("owner", "first", PROMPT, host_id(), "tcp://127.0.0.1:1", b"", memory_address=address)
        writer = await HandoffWriter.start(pool, lambda arrival: None, timeout_s=0.5)
        connecting = asyncio.create_task(writer.connect("token-0", [offer]))
        connection, _ = await asyncio.to_thread(owner_socket.accept)
        with connection:
            connecting.cancel()
            await asyncio.wait([connecting])
            await writer.aclose()
    assert not asyncio.all_tasks(writer._loop)
