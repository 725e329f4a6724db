"""A way to a stage whose connection breaks while nothing goes over it, and both ends live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from tests.unit.kv.processes import until
from tests.unit.kv.test_stream import drained, scene, span


class Road:
    """Forwards connections to an endpoint, until they are broken."""

    def __init__(self, endpoint: str) -> None:
        self._host, self._port = endpoint.removeprefix("tcp://").split(":")
        self._ends: set[asyncio.StreamWriter] = set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, int(self._port))
        self._ends |= {writer, back}
        with suppress(ConnectionError):
            await asyncio.gather(_carry(reader, back), _carry(there, writer))

    def break_all(self) -> None:
        """Those that come later are forwarded."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def road(endpoint: str) -> AsyncIterator[tuple[Road, str]]:
    way = Road(endpoint)
    server = await asyncio.start_server(way.forward, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield way, f"tcp://{host}:{port}"
        way.break_all()


async def test_a_connection_that_broke_while_idle_costs_no_hand_off() -> None:
    async with scene("zmq") as s, road(s.offers[0].zmq_endpoint) as (way, endpoint):
        offers = [msgspec.structs.replace(s.offers[0], zmq_endpoint=endpoint), *s.offers[1:]]
        await s.writer.connect("token-0", offers)
        s.writer.submit(span((0, 7), "r/1", range(20, 23)), 0)
        assert await drained(s.writer, "r/1") is None
        way.break_all()
        await until(lambda: s.writer.links("token-0") == [None, "zmq", "zmq"])
        s.writer.submit(span(), 0)
        assert await drained(s.writer) is None
        assert s.verified() == [True, True] and s.writer.links("token-0") == ["zmq"] * 3
