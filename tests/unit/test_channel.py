"""What arrives at an inbox that is not read yet."""

from __future__ import annotations

import asyncio

from common.channel import Inbox, Outbox


async def test_what_arrives_before_an_inbox_is_read_is_heard_then() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    inbox = await Inbox.bind("tcp://127.0.0.1:*", lambda peer, frames: heard.put_nowait(bytes(frames[0])))
    inbox.pause()
    answered: asyncio.Queue[bytes] = asyncio.Queue()
    outbox = await Outbox.connect(inbox.endpoint, "early", lambda frames: answered.put_nowait(bytes(frames[0])))
    other = await Outbox.connect(inbox.endpoint, "other")
    read: asyncio.Queue[bytes] = asyncio.Queue()
    read_inbox = await Inbox.bind("tcp://127.0.0.1:*", lambda peer, frames: read.put_nowait(bytes(frames[0])))
    later = await Outbox.connect(read_inbox.endpoint, "later")
    try:
        for index in range(3):
            outbox.send(b"%d" % index)
        other.send(b"there")
        later.send(b"elsewhere")
        assert await read.get() == b"elsewhere"
        assert heard.empty()
        inbox.resume()
        inbox.resume()
        async with asyncio.timeout(5):
            assert sorted([await heard.get() for _ in range(4)]) == [b"0", b"1", b"2", b"there"]
            inbox.send(b"early", b"welcome")
            assert await answered.get() == b"welcome"
    finally:
        for each in (outbox, other, later, inbox, read_inbox):
            each.close()


async def test_an_inbox_that_was_never_read_can_be_closed() -> None:
    inbox = await Inbox.bind("tcp://127.0.0.1:*", lambda peer, frames: None)
    inbox.pause()
    outbox = await Outbox.connect(inbox.endpoint, "early")
    outbox.send(b"anybody there?")
    inbox.close()
    outbox.close()
