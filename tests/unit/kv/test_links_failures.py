"""What becomes of a link whose other end dies, stands still, comes back as somebody else or does not fit."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from common.kv.link import GrantOffer, Link, LinkError, LinkLost, LinkRefused, LinkTimeout, open_link
from common.kv.nixl_link import NixlLink
from common.kv.offer import PROTOCOL_VERSION
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.zmq_link import ZmqLink
from dejavu.errors import ProtocolError
from tests.unit.kv.link_ends import (
    OWNED,
    TIMEOUT_S,
    close_quietly,
    connected,
    descriptors,
    only,
    piece,
    random_pool,
    shared_memory,
    whole,
)
from tests.unit.kv.processes import BIG, child, owner, until
from tests.unit.kv.reference import layout

every_kind = pytest.mark.parametrize("kind", OWNED)
both_ways = pytest.mark.parametrize("direction", ["write", "read"])


# ------------------------------------------------------------------ strangers


@every_kind
async def test_what_does_not_fit_is_refused_naming_both(kind: str) -> None:
    destination = KvPool.create(layout(), name="token-0-1")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    offer = only(kind, server.offer)
    unfit: dict[str, tuple[int | str, str]] = {
        "fingerprint": ("other", "model of prompt-0-0 is other, of token-0-1 it is model"),
        "dtype": ("float16", "dtype of prompt-0-0 is float16, of token-0-1 it is float32"),
        "head_dim": (16, "head_dim of prompt-0-0 is 16, of token-0-1 it is 8"),
        "first_head": (2, "prompt-0-0 has the KV heads .* token-0-1 has"),
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
    wrong = {
        "protocol": (PROTOCOL_VERSION + 1, "prompt-0-0 speaks KV protocol .*, token-0-1"),
        "token": (b"guess", "prompt-0-0 does not have the token of token-0-1"),
        "incarnation": ("second", "token-0-1 is not what it offered"),
    }
    for field, (wrong_value, message) in wrong.items():
        with pytest.raises(LinkRefused, match=message):
            await open_link(msgspec.structs.replace(offer, **{field: wrong_value}), source, timeout_s=TIMEOUT_S)
    await server.aclose()


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
    for kind in ("shm", "zmq"):
        link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
        await link.write(source, whole(layout(), layout()))
        await link.aclose()
    await server.aclose()
    with pytest.raises(ProtocolError):
        GrantOffer.decode('{"name": 1}')


# ------------------------------------------------------------------ death


@every_kind
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


@every_kind
@both_ways
async def test_owner_killed_in_the_middle(kind: str, direction: str) -> None:
    with owner() as (process, offer), ThreadPoolExecutor(1) as executor:
        source = random_pool(BIG)
        link = await open_link(only(kind, offer), source, executor=executor, timeout_s=10.0)
        hold = threading.Event()
        if kind == "shm":
            executor.submit(hold.wait)  # the copy is about to begin
        elif kind == "zmq":
            process.freeze()  # some messages are under way, none is answered
        moving = asyncio.create_task(again_and_again(link, direction, source))
        if isinstance(link, ZmqLink):
            await until(lambda: bool(link._requests))
        if isinstance(link, NixlLink):
            await until(lambda: bool(link._works))
        await asyncio.sleep(0)
        process.kill()
        hold.set()
        with pytest.raises(LinkLost) as lost:
            async with asyncio.timeout(TIMEOUT_S):
                await moving
        if direction == "read" or kind == "shm":
            assert not lost.value.may_still_write
        source.memory[:] = 7
        for call in (link.write, link.read):
            with pytest.raises(LinkLost):
                await call(source, whole(BIG, BIG))
        assert (source.memory == 7).all()
        await close_quietly(link)


async def again_and_again(link: Link, direction: str, pool: KvPool) -> None:
    while True:
        await getattr(link, direction)(pool, whole(BIG, BIG))


@every_kind
async def test_a_killed_owner_is_noticed_while_idle(kind: str) -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only(kind, offer), source, timeout_s=TIMEOUT_S)
        assert not link.is_over
        process.kill()
        await until(lambda: link.is_over)
        with pytest.raises(LinkLost):
            await link.write(source, piece(8))
        await close_quietly(link)


@every_kind
async def test_killed_writers_leave_nothing_behind(kind: str) -> None:
    shared_before = shared_memory()
    destination = KvPool.create(BIG, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    before = descriptors()
    for _ in range(2):
        with child("writer", only(kind, server.offer).encode()) as writer:
            assert await asyncio.to_thread(writer.read) == "written"
            writer.kill()
    await until(lambda: descriptors() <= before)
    # the owner still serves
    source = random_pool(BIG)
    link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    await link.write(source, whole(BIG, BIG))
    assert np.array_equal(source.memory, destination.memory)
    await link.aclose()
    await server.aclose()
    assert shared_memory() <= shared_before


@every_kind
async def test_a_successor_at_the_same_address_is_not_taken_for_the_owner(kind: str) -> None:
    source = random_pool(BIG)
    with owner() as (process, offer):
        link = await open_link(only(kind, offer), source, timeout_s=TIMEOUT_S)
        await link.write(source, piece(4096))
        process.kill()
    port = offer.zmq_endpoint.rpartition(":")[2]
    with owner("--port", port, "--incarnation", "second") as (process, new_offer):
        assert new_offer.zmq_endpoint == offer.zmq_endpoint
        with pytest.raises(LinkLost):
            await link.write(source, piece(4096))
        with pytest.raises(LinkRefused, match="writer does not have the token of owner"):
            await open_link(only(kind, offer), source, timeout_s=TIMEOUT_S)
        knows_the_token = msgspec.structs.replace(only(kind, offer), token=new_offer.token)
        with pytest.raises(LinkRefused, match="owner is not what it offered: it was replaced"):
            await open_link(knows_the_token, source, timeout_s=TIMEOUT_S)
        again = await open_link(only(kind, new_offer), source, timeout_s=TIMEOUT_S)
        await again.write(source, whole(BIG, BIG))
        await again.aclose()
    await close_quietly(link)


# ------------------------------------------------------------------ frost


@every_kind
@both_ways
async def test_a_frozen_owner_costs_no_more_than_the_deadline(kind: str, direction: str) -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only(kind, offer), source, timeout_s=0.3)
        process.freeze()
        async with asyncio.timeout(TIMEOUT_S):
            try:
                await getattr(link, direction)(source, whole(BIG, BIG))
                assert kind != "zmq"  # the others may need no help from the other side
            except LinkTimeout as timed_out:
                assert kind != "shm" and timed_out.may_still_write == (direction == "write")
            with pytest.raises(LinkTimeout, match="did not answer"):
                await open_link(only(kind, offer), source, timeout_s=0.3)
        source.memory[:] = 7
        process.thaw()
        await close_quietly(link)
        assert (source.memory == 7).all()


@every_kind
async def test_what_ran_out_of_time_says_whether_it_is_over(kind: str) -> None:
    source, destination = random_pool(BIG), KvPool.create(BIG, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    num_in_time = 0
    for delay_s in (0.0, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3):
        link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
        link._timeout_s = delay_s  # type: ignore[attr-defined]
        try:
            await link.write(source, whole(BIG, BIG))
            num_in_time, is_over = num_in_time + 1, True
        except LinkTimeout as timed_out:
            is_over = not timed_out.may_still_write
        destination.memory[:] = 7
        link._timeout_s = TIMEOUT_S  # type: ignore[attr-defined]
        await close_quietly(link)
        assert not is_over or (destination.memory == 7).all()
    assert kind == "shm" or num_in_time < 7
    await server.aclose()


async def test_closing_says_that_a_frozen_owner_may_still_write() -> None:
    with owner() as (process, offer):
        source = random_pool(BIG)
        link = await open_link(only("zmq", offer), source, timeout_s=0.3)
        process.freeze()
        with pytest.raises(LinkTimeout):
            await link.write(source, whole(BIG, BIG))
        with pytest.raises(LinkTimeout) as unconfirmed:
            await link.aclose()
        assert unconfirmed.value.may_still_write
        process.thaw()


async def test_an_executor_without_time_is_a_timeout() -> None:
    with ThreadPoolExecutor(1) as executor:
        destination = KvPool.create(layout(), name="owner")
        server = await PoolServer.start(destination, "127.0.0.1", "first")
        source = random_pool(layout())
        link = await open_link(server.offer, source, executor=executor, timeout_s=0.1)
        hold = threading.Event()
        executor.submit(hold.wait)
        for call in (link.write, link.read):
            with pytest.raises(LinkTimeout) as timed_out:
                await call(source, whole(layout(), layout()))
            assert not timed_out.value.may_still_write
        hold.set()
        await link.aclose()
        assert not destination.memory.any()
        await server.aclose()


async def test_another_host_gets_zmq() -> None:
    destination = KvPool.create(layout(), name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    source = random_pool(layout())
    for change in ({"host_id": "elsewhere"}, {"memory_address": "dejavu-kv-nobody"}):
        offer = msgspec.structs.replace(server.offer, **change, has_nixl=False)
        link = await open_link(offer, source)
        assert link.name == "zmq"
        await link.aclose()
    async with connected("shm", layout(), layout()) as ends:
        assert ends.link.name == "shm"
    await server.aclose()
