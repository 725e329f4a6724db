"""Who speaks another protocol to a socket of ours is cut off; who speaks ours is heard."""

from __future__ import annotations

import asyncio
import random

import pytest

from common.channel import Inbox, Outbox
from common.kv.fence import Fence
from common.kv.pool import KvPool
from common.kv.zmq_door import ZmqDoor
from tests.unit.kv.reference import SMALL

LIMIT_S = 5.0

strangers = pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 400,
        random.Random(1).randbytes(2000),
        b"",
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f",
    ],
    ids=["http", "tls", "noise", "silence", "half a greeting"],
)


async def is_cut_off(endpoint: str, said: bytes) -> asyncio.StreamWriter:
    """Returns once the other side has closed the connection."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    async with asyncio.timeout(LIMIT_S):
        try:
            while await reader.read(1000):
                pass
        except ConnectionResetError:
            pass
    return writer


@strangers
async def test_a_stranger_is_cut_off(said: bytes) -> None:
    heard: asyncio.Queue[list[bytes]] = asyncio.Queue()
    inbox = await Inbox.bind(
        "tcp://127.0.0.1:*", lambda peer, frames: heard.put_nowait([bytes(frame) for frame in frames])
    )
    writer = await is_cut_off(inbox.endpoint, said)
    friend = await Outbox.connect(inbox.endpoint, "friend")
    friend.send(b"hello")
    async with asyncio.timeout(LIMIT_S):
        assert await heard.get() == [b"hello"]
    assert heard.empty()
    for each in (friend, inbox, writer):
        each.close()


@strangers
async def test_a_stranger_is_cut_off_from_a_pool(said: bytes) -> None:
    door = ZmqDoor(KvPool.create(SMALL), Fence(), "127.0.0.1", 0)
    try:
        (await is_cut_off(door.endpoint, said)).close()
    finally:
        door.close()
