"""A router's public side over a real socket, answering as each test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, TypeVar

import zmq
import zmq.asyncio

from dejavu import wire
from dejavu.wire import Accepted, Ended, Submit, TokenFrame, Tokens

Message = TypeVar("Message")
TEXTS = ["Once", " upon", " a", " time", "."]


class FakeRouter:
    """Welcomes, pongs, and calls `on_submit(router, client, submit)`; keeps everything else for `got`."""

    def __init__(
        self,
        on_submit: Callable[[FakeRouter, bytes, Submit], object],
        routers: list[str] | None = None,
        port: int = 0,
        version: int = wire.PROTOCOL_VERSION,
    ):
        self.on_submit = on_submit
        self.is_silent = False
        self.status = b'{"epoch": 3, "services": [], "counters": {}}'
        self.received: asyncio.Queue[Any] = asyncio.Queue()
        self.clients: list[bytes] = []
        self.endpoint = ""
        self.port = port
        self._others = routers or []
        self._version = version

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = 0
        self._socket.bind(f"tcp://127.0.0.1:{self.port or '*'}")
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.port = int(self.endpoint.rpartition(":")[2])
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
        await asyncio.wait([self._task])

    def close(self) -> None:
        """As if the process died."""
        self._task.cancel()
        self._context.destroy(linger=0)

    def send(self, client: bytes, *messages: wire.RouterMessage) -> None:
        for message in messages:
            self.send_raw(client, wire.encode(message))

    def send_raw(self, client: bytes, frame: bytes) -> None:
        self._socket.send_multipart([client, frame], flags=zmq.DONTWAIT)

    async def got(self, kind: type[Message]) -> Message:
        """The next message of this kind; others are thrown away."""
        async with asyncio.timeout(5):
            while not isinstance(message := await self.received.get(), kind):
                pass
            return message

    async def _serve(self) -> None:
        while True:
            client, frame = await self._socket.recv_multipart()
            message = wire.decode_client_message(frame)
            self.received.put_nowait(message)
            if self.is_silent:
                continue
            match message:
                case wire.Hello():
                    self.clients.append(client)
                    routers = [self.endpoint, *self._others]
                    self.send(client, wire.Welcome(self._version, routers, "", "fake", 100, 1000))
                case wire.Ping():
                    self.send(client, wire.Pong())
                case wire.StatusQuery(query_id):
                    self.send(client, wire.StatusReply(query_id, self.status))
                case Submit():
                    self.on_submit(self, client, message)
                case _:
                    pass


def frames(submit: Submit, first: int = 0, last: int = len(TEXTS), choice: int = 0) -> Tokens:
    """Tokens [first, last) of the story; the fifth is the last one."""
    reasons = [None, None, None, None, "stop"]
    return Tokens(
        [
            TokenFrame(submit.request_id, choice, 1, index, 10 + index, TEXTS[index], reasons[index])
            for index in range(first, last)
        ]
    )


def tell_story(router: FakeRouter, client: bytes, submit: Submit) -> None:
    """The whole story for every choice, from where the client is."""
    router.send(client, Accepted(submit.request_id, 4))
    for choice in range(submit.params.n):
        num_delivered = len(submit.delivered[choice]) if submit.delivered else 0
        router.send(client, frames(submit, num_delivered, choice=choice))
    router.send(client, Ended(submit.request_id, "finished", 4, len(TEXTS) * submit.params.n))
