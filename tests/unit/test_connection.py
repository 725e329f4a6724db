"""A client lets go of its sockets, whatever libzmq does."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
import zmq
import zmq.asyncio

from dejavu import connection
from dejavu.connection import Connection

NUM_ROUTERS = 200
MAX_LIFE_S = 0.004
"""Of a router: it may die before, while or after it is greeted."""


async def test_closing_ends_also_where_libzmq_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TERMINATION_LIMIT_S", 0.05)
    before = set(threading.enumerate())
    context = zmq.asyncio.Context()
    forgotten = context.socket(zmq.DEALER)
    async with asyncio.timeout(5):
        await connection.terminate(context)
    forgotten.close(linger=0)
    async with asyncio.timeout(5):
        while set(threading.enumerate()) - before:  # noqa: ASYNC110 - of daemon threads nothing tells us
            await asyncio.sleep(0.01)


async def test_a_socket_that_has_lost_its_router_is_let_go_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it has: what libzmq has begun for it then must come to its end."""
    monkeypatch.setattr(connection, "LINGER_MS", 0)
    routers, draws = zmq.Context(), random.Random(1)
    for _ in range(NUM_ROUTERS):
        router = routers.socket(zmq.ROUTER)
        endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        context = zmq.asyncio.Context()
        for _ in range(3):
            lost = Connection(context, endpoint)
            lost.open()
            tasks = [asyncio.ensure_future(lost.watch()), asyncio.ensure_future(lost.receive())]
            await asyncio.sleep(draws.random() * MAX_LIFE_S)
            if draws.randrange(2):
                router.close(linger=0)
            await asyncio.wait(tasks, timeout=draws.choice((0.0, 0.01)), return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            lost.close()
        router.close(linger=0)
        await connection.terminate(context)
    routers.term()
    assert not caplog.records
