"""A client lets go of its sockets, whatever libzmq does."""

from __future__ import annotations

import asyncio
import threading

import pytest
import zmq
import zmq.asyncio

from dejavu import connection


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
