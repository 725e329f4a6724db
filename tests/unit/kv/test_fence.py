"""Whoever writes under an epoch that is over is kept out, and it shows when that is certain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.kv.errors import LinkError, LinkLost, LinkRefused
from common.kv.link import open_link
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.zmq_connection import ZmqConnection
from tests.unit.kv.link_ends import OWNED, TIMEOUT_S, close_quietly, only, piece, random_pool
from tests.unit.kv.processes import BIG, Child, child, until
from tests.unit.kv.reference import layout

OLD, NEW = {"prompt-0": 4, "token-0": 9}, {"prompt-0": 5, "token-0": 9}


@pytest.mark.parametrize("kind", OWNED)
async def test_only_writers_of_older_epochs_are_kept_out(kind: str) -> None:
    source, destination = random_pool(layout()), KvPool.create(layout(), name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    offer = only(kind, server.offer)
    old = await open_link(offer, source, authority=OLD, timeout_s=TIMEOUT_S)
    new = await open_link(offer, source, authority=NEW, timeout_s=TIMEOUT_S)
    reader = await open_link(offer, source, timeout_s=TIMEOUT_S)
    await old.write(source, piece(64))
    async with asyncio.timeout(TIMEOUT_S):
        await server.fence({"prompt-0": 5})
        await server.fence({"prompt-0": 3})  # it never falls
    destination.memory[:] = 0
    old._timeout_s = 0.3  # type: ignore[attr-defined] # whom its owner does not answer any more waits for so long
    with pytest.raises(LinkError):
        await old.write(source, piece(64))
    assert not destination.memory.any()
    with pytest.raises(LinkRefused, match="under an epoch that is over"):
        await open_link(offer, source, authority=OLD, timeout_s=TIMEOUT_S)
    await new.write(source, piece(64))
    assert np.array_equal(destination.memory[:64], source.memory[:64])
    await reader.read(KvPool.create(layout(), name="copy"), piece(64))
    for link in (old, new, reader):
        await close_quietly(link)
    await server.aclose()


async def test_a_copy_that_is_running_is_waited_for() -> None:
    """The writer's end of the connection stays until it writes no more, whoever ends the link."""
    source, destination = random_pool(layout()), KvPool.create(layout(), name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    with ThreadPoolExecutor(1) as executor:
        link = await open_link(server.offer, source, authority=OLD, executor=executor, timeout_s=TIMEOUT_S)
        hold = threading.Event()
        executor.submit(hold.wait)
        writing = asyncio.create_task(link.write(source, piece(64)))
        await until(lambda: bool(link._copies))  # type: ignore[attr-defined]
        fencing = asyncio.create_task(server.fence(NEW))
        await until(lambda: not link._owner._is_open)  # type: ignore[attr-defined]
        assert not fencing.done() and not destination.memory.any()
        hold.set()
        with pytest.raises(LinkLost):
            await writing
        async with asyncio.timeout(TIMEOUT_S):
            await fencing
        await link.aclose()
    await server.aclose()


@pytest.mark.parametrize("end", [Child.thaw, Child.kill])
async def test_a_writer_that_stands_still_is_waited_for(end: Callable[[Child], None]) -> None:
    destination = KvPool.create(BIG, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    with child("writer", only("shm", server.offer).encode(), "--epoch", "4") as writer:
        assert await asyncio.to_thread(writer.read) == "written"
        writer.freeze()
        fencing = asyncio.create_task(server.fence(NEW))
        await server.fence({"somebody else": 1})
        assert not fencing.done()
        end(writer)
        async with asyncio.timeout(TIMEOUT_S):
            await fencing
        destination.memory[:] = 0
        await server.fence({"somebody else": 2})
        assert not destination.memory.any()
    await server.aclose()


async def test_a_one_sided_writer_is_out_once_it_has_left_or_is_known_to_be_dead() -> None:
    """Its transfers need nobody at the owner's side, so nobody there can refuse them."""
    source, destination = random_pool(layout()), KvPool.create(layout(), name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    connection = ZmqConnection(server.offer, TIMEOUT_S)
    await connection.enter(source, "nixl", {**OLD, "incarnation": 0})
    fencing = asyncio.create_task(server.fence(NEW))
    await server.fence({"somebody else": 1})
    assert not fencing.done()
    await server.bury("incarnation")
    async with asyncio.timeout(TIMEOUT_S):
        await fencing
    await connection.aclose()
    await server.aclose()
    with pytest.raises(LinkLost):
        await server.fence(NEW)
