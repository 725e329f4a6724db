"""A client and a router that speak different versions of the protocol."""

from __future__ import annotations

import asyncio

import pytest

from dejavu import AsyncClient
from dejavu.errors import ProtocolError, Unavailable
from dejavu.wire import PROTOCOL_VERSION
from tests.unit.fake_router import TEXTS, FakeRouter, tell_story

NOBODY = "tcp://127.0.0.1:1"


async def test_a_router_of_another_protocol_version_is_passed_over_while_another_may_come() -> None:
    other = PROTOCOL_VERSION + 1
    async with FakeRouter(tell_story, version=other) as stranger, FakeRouter(tell_story) as router:
        async with AsyncClient([stranger.endpoint, router.endpoint]) as client:
            assert (await client.generate("Tell")).text == "".join(TEXTS)
        with pytest.raises(Unavailable, match=f"speaks protocol {other}, not {PROTOCOL_VERSION}.*refused"):
            await AsyncClient([stranger.endpoint, NOBODY], connect_timeout_s=0.5).__aenter__()
        with pytest.raises(ProtocolError, match=f"speaks protocol {other}, not {PROTOCOL_VERSION}"):
            async with asyncio.timeout(10):
                await AsyncClient(stranger.endpoint, connect_timeout_s=60).__aenter__()
