"""What every link has to keep; and what becomes of a link whose peer dies, freezes or does not fit."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvloop

from common.kv.geometry import CopyPlan, plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, Link, LinkError, LinkLost, LinkRefused, LinkTimeout, open_link
from common.kv.offer import PROTOCOL_VERSION
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.zmq_link import ZmqLink, split
from dejavu.errors import ProtocolError
from tests.unit.kv.processes import BIG, child, owner
from tests.unit.kv.reference import layout

KINDS = ["shm", "zmq"]
TIMEOUT_S = 5.0


def random_pool(pool_layout: PoolLayout, name: str = "writer") -> KvPool:
    pool = KvPool.create(pool_layout, name=name)
    pool.memory[:] = np.random.default_rng(0).integers(0, 256, len(pool.memory), dtype=np.uint8)
    return pool


def only(kind: str, offer: GrantOffer) -> GrantOffer:
    return offer if kind == "shm" else msgspec.structs.replace(offer, memory_address=None)


@asynccontextmanager
async def connected(
    kind: str, ours: PoolLayout = BIG, theirs: PoolLayout = BIG
) -> AsyncIterator[tuple[KvPool, KvPool, Link]]:
    source, destination = random_pool(ours), KvPool.create(theirs, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    try:
        yield source, destination, link
    finally:
        await link.aclose()
        await server.aclose()
        source.close()
        destination.close()


def whole(ours: PoolLayout, theirs: PoolLayout) -> CopyPlan:
    num_tokens = min(ours.num_blocks * ours.block_size, theirs.num_blocks * theirs.block_size)
    return plan_copies(ours, range(ours.num_blocks), theirs, range(theirs.num_blocks), (0, num_tokens), theirs.layers)


# ------------------------------------------------------------------ conformance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_bytes_are_there(kind: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    theirs = layout(first_layer=1, last_layer=3, num_blocks=32, block_size=128, num_kv_heads=8, head_dim=64)

    async def check() -> None:
        async with connected(kind, BIG, theirs) as (source, destination, link):
            assert link.name == kind
            await link.write(source, whole(BIG, theirs))
            for local in range(2):
                for ours, arrived in zip(source.layer(local + 1), destination.layer(local), strict=True):
                    assert np.array_equal(
                        ours.flatten(0, 1).numpy().view(np.uint8),
                        arrived.flatten(0, 1).numpy().view(np.uint8),
                    )

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())


@pytest.mark.parametrize("kind", KINDS)
async def test_many_small_pieces(kind: str) -> None:
    theirs = msgspec.structs.replace(BIG, num_kv_heads=3, first_head=2)
    async with connected(kind, BIG, theirs) as (source, destination, link):
        blocks = np.random.default_rng(1).permutation(256).tolist()
        plan = plan_copies(BIG, range(256), theirs, blocks, (0, 4096), (0, 4))
        assert len(plan) == 4096 * 8
        await link.write(source, plan)
        assert np.array_equal(
            source.layer(2)[1][:, :, 2:5].numpy().view(np.uint8),
            destination.layer(2)[1][blocks].numpy().view(np.uint8),
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_writes_at_the_same_time(kind: str) -> None:
    async with connected(kind) as (source, destination, link):
        plans = [
            plan_copies(BIG, range(256), BIG, range(256), (first, first + 64), (layer, layer + 1))
            for first in range(0, 4096, 64)
            for layer in range(4)
        ]
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                tasks.create_task(link.write(source, plan))
        assert np.array_equal(source.memory, destination.memory)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_plan_that_leaves_the_pool_is_refused(kind: str) -> None:
    async with connected(kind) as (source, destination, link):
        for offset in (-1, BIG.total_bytes - 7, 1 << 62):
            plan = CopyPlan(np.array([0]), np.array([offset]), np.array([8]))
            with pytest.raises(ValueError, match="do not lie within"):
                await link.write(source, plan)
        await link.write(source, whole(BIG, BIG))
        assert np.array_equal(source.memory, destination.memory)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_closed_link_writes_no_more(kind: str) -> None:
    async with connected(kind) as (source, destination, link):
        await link.aclose()
        await link.aclose()
        with pytest.raises(LinkLost):
            await link.write(source, whole(BIG, BIG))
        assert not destination.memory.any()


@pytest.mark.parametrize("kind", KINDS)
async def test_the_owner_closes(kind: str) -> None:
    source, destination = random_pool(BIG), KvPool.create(BIG, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    await server.aclose()
    await server.aclose()
    with pytest.raises(LinkLost):
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                await link.write(source, whole(BIG, BIG))
    with pytest.raises(LinkError):
        await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    await close_quietly(link)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_does_not_fit_is_refused_naming_both(kind: str) -> None:
    destination = KvPool.create(layout(), name="token-0-1")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    offer = only(kind, server.offer)
    unfit: dict[str, tuple[int | str, str]] = {
        "fingerprint": ("other", "model of prompt-0-0 is other, of token-0-1 it is model"),
        "dtype": ("float16", "dtype of prompt-0-0 is float16"),
        "head_dim": (16, "head_dim of prompt-0-0 is 16"),
        "first_head": (2, "KV heads"),
    }
    for change, (value, message) in unfit.items():
        source = KvPool.create(layout(**{change: value}), name="prompt-0-0")
        with pytest.raises(LinkRefused, match=message):
            await open_link(offer, source, timeout_s=TIMEOUT_S)
        # the owner itself refuses as well, should a writer not look
        unlike = msgspec.structs.replace(offer, layout=source.layout)
        with pytest.raises(LinkRefused, match=message):
            await open_link(unlike, source, timeout_s=TIMEOUT_S)
    source = KvPool.create(layout(), name="prompt-0-0")
    wrong = {"protocol": PROTOCOL_VERSION + 1, "token": b"guess", "incarnation": "second"}
    for field, wrong_value in wrong.items():
        changed = msgspec.structs.replace(offer, **{field: wrong_value})
        with pytest.raises(LinkRefused, match=field if field != "incarnation" else "was replaced"):
            await open_link(changed, source, timeout_s=TIMEOUT_S)
    await server.aclose()


# ------------------------------------------------------------------ death, frost, strangers


@pytest.mark.parametrize("kind", KINDS)
async def test_owner_killed_in_the_middle_of_a_write(kind: str) -> None:
    with owner() as (process, offer), ThreadPoolExecutor(1) as executor:
        source = random_pool(BIG)
        link = await open_link(only(kind, offer), source, executor=executor, timeout_s=10.0)
        hold = threading.Event()
        if kind == "shm":
            executor.submit(hold.wait)  # the copy is about to begin
        else:
            process.freeze()  # some messages are under way, none is acknowledged
        writing = asyncio.create_task(link.write(source, whole(BIG, BIG)))
        if isinstance(link, ZmqLink):
            await until(lambda: bool(link._unwritten))
        await asyncio.sleep(0)
        process.kill()
        hold.set()
        with pytest.raises(LinkLost):
            async with asyncio.timeout(TIMEOUT_S):
                await writing
        with pytest.raises(LinkLost):
            await link.write(source, whole(BIG, BIG))
        await close_quietly(link)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_owner_is_noticed_while_idle(kind: str) -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only(kind, offer), source, timeout_s=TIMEOUT_S)
        process.kill()
        with pytest.raises(LinkLost):
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    await link.write(source, CopyPlan(np.array([0]), np.array([0]), np.array([8])))
        await close_quietly(link)


async def test_a_frozen_owner_costs_no_more_than_the_deadline() -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only("zmq", offer), source, timeout_s=0.3)
        process.freeze()
        with pytest.raises(LinkTimeout) as timed_out:
            await link.write(source, whole(BIG, BIG))
        assert timed_out.value.may_still_write
        with pytest.raises(LinkTimeout) as unconfirmed:
            await link.aclose()
        assert unconfirmed.value.may_still_write
        for kind in KINDS:
            with pytest.raises(LinkTimeout, match="did not answer"):
                await open_link(only(kind, offer), source, timeout_s=0.3)
        process.thaw()


async def test_a_write_that_timed_out_is_confirmed_by_closing_once_the_owner_wakes() -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only("zmq", offer), source, timeout_s=0.3)
        process.freeze()
        with pytest.raises(LinkTimeout):
            await link.write(source, whole(BIG, BIG))
        process.thaw()
        await link.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_killed_writers_leave_nothing_behind(kind: str) -> None:
    shared_before = set(os.listdir("/dev/shm"))
    destination = KvPool.create(BIG, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    fds_before = fds()
    for _ in range(2):
        with child("writer", only(kind, server.offer).encode()) as writer:
            assert await asyncio.to_thread(writer.read) == "written"
            writer.kill()
    await until(lambda: fds() <= fds_before)
    # the owner still serves
    source = random_pool(BIG)
    link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    await link.write(source, whole(BIG, BIG))
    assert np.array_equal(source.memory, destination.memory)
    await link.aclose()
    await server.aclose()
    left = {name for name in os.listdir("/dev/shm") if not name.startswith("__KMP_")}
    assert left <= shared_before


async def test_opening_and_closing_leaks_no_descriptor() -> None:
    await open_and_close()
    before = fds()
    for _ in range(5):
        await open_and_close()
    await until(lambda: len(fds()) <= len(before))


async def open_and_close() -> None:
    for kind in KINDS:
        async with connected(kind, layout(), layout()) as (source, _, link):
            await link.write(source, whole(layout(), layout()))


async def test_strangers_at_the_doors() -> None:
    destination = KvPool.create(layout(), name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{server.offer.memory_address}")
        stranger.send(b"open sesame")
        stranger.settimeout(TIMEOUT_S)
        assert stranger.recv(100) == b""
    host, _, port = server.offer.zmq_endpoint.removeprefix("tcp://").partition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
    source = random_pool(layout())
    for kind in KINDS:
        link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
        await link.write(source, whole(layout(), layout()))
        await link.aclose()
    await server.aclose()
    with pytest.raises(ProtocolError):
        GrantOffer.decode('{"name": 1}')


async def test_another_host_gets_zmq_and_an_executor_without_time_is_a_timeout() -> None:
    with ThreadPoolExecutor(1) as executor:
        destination = KvPool.create(layout(), name="owner")
        server = await PoolServer.start(destination, "127.0.0.1", "first")
        source = random_pool(layout())
        elsewhere = msgspec.structs.replace(server.offer, host_id="elsewhere")
        link = await open_link(elsewhere, source)
        assert link.name == "zmq"
        await link.aclose()
        unreachable = msgspec.structs.replace(server.offer, memory_address="dejavu-kv-nobody")
        link = await open_link(unreachable, source)
        assert link.name == "zmq"
        await link.aclose()
        link = await open_link(server.offer, source, executor=executor, timeout_s=0.1)
        hold = threading.Event()
        executor.submit(hold.wait)
        with pytest.raises(LinkTimeout) as timed_out:
            await link.write(source, whole(layout(), layout()))
        assert not timed_out.value.may_still_write
        hold.set()
        await link.aclose()
        assert not destination.memory.any()
        await server.aclose()


def test_split_cuts_into_parts_of_at_most_the_size() -> None:
    sizes = np.array([10, 3, 3, 25, 1])
    plan = CopyPlan(np.cumsum(sizes) - sizes, 100 + np.cumsum(sizes) - sizes, sizes)
    parts = list(split(plan, 10))
    assert [part.num_bytes.tolist() for part in parts] == [[10], [3, 3], [10], [10], [5, 1]]
    assert np.concatenate([part.source_offset for part in parts]).tolist() == [0, 10, 13, 16, 26, 36, 41]
    assert all(np.array_equal(part.destination_offset, part.source_offset + 100) for part in parts)


async def until(is_so: Callable[[], bool]) -> None:
    """For what other threads and the kernel do in their own time."""
    async with asyncio.timeout(5.0):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


def fds() -> set[str]:
    return {f"{path.name} {os.readlink(path)}" for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


async def close_quietly(link: Link) -> None:
    try:
        await link.aclose()
    except LinkError as error:
        assert error.may_still_write
