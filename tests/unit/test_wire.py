"""What arrives from the network and is nothing that we know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest
import zmq
import zmq.asyncio

from common import messages
from common.channel import Inbox
from dejavu import wire

NO_TEXT = b"\x92\xa6cancel\xa2\xff\xfe"
"""A cancel whose request id is no UTF-8."""
TOO_DEEP = b"\x91" * 100_000


@pytest.mark.parametrize("frame", [b"", b"\xff", NO_TEXT, TOO_DEEP, msgspec.msgpack.encode(["cancel", 7])])
@pytest.mark.parametrize(
    "decode",
    [
        wire.decode_client_message,
        wire.decode_router_message,
        messages.decode_router_inbox,
        messages.decode_stage_inbox,
        messages.decode_store_inbox,
        lambda frame: wire.decode_strictly(msgspec.msgpack.Decoder(list[list[object]]), frame),
    ],
)
def test_nonsense_is_a_decode_error(decode: Callable[[bytes], object], frame: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(frame)


async def test_a_message_that_cannot_be_handled_holds_up_no_other() -> None:
    handled: asyncio.Queue[bytes] = asyncio.Queue()

    def handle(peer: bytes, frames: list[memoryview]) -> None:
        if bytes(frames[0]) == b"bad":
            raise ValueError(frames[0])
        handled.put_nowait(bytes(frames[0]))

    inbox = await Inbox.bind("tcp://127.0.0.1:*", handle)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(inbox.endpoint)
    try:
        for round_ in range(20):
            for _ in range(3):
                socket.send(b"bad")
            socket.send(b"%d" % round_)
            async with asyncio.timeout(5):
                assert await handled.get() == b"%d" % round_
    finally:
        context.destroy(linger=0)
        inbox.close()
