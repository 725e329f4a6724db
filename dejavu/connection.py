"""One connection to one router. It never reconnects by itself: to the router, a new one is a new client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from typing import NoReturn, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from dejavu import wire
from dejavu.errors import ConfigurationError
from dejavu.keys import protect_client

logger = logging.getLogger(__name__)

LINGER_MS = 500
"""How long a closed socket may still send what it has: the last `Cancel`."""
TERMINATION_LIMIT_S = 2.0
RECONNECT_MS = 24 * 3600 * 1000
"""Never: a connection that is lost is given up at once. With -1, libzmq's word for it, a socket that has just lost its
peer is sometimes not let go of."""
MAX_WAITING_MESSAGES = 100_000
"""In either direction. Large, so that a user who blocks the event loop for some seconds loses no token."""


class RouterLost(Exception):
    """This router is of no use (any more); the text says why."""


class OtherVersion(RouterLost):
    """It speaks another version of the protocol, and will not learn ours."""


class Connection:
    """A DEALER socket under a fresh client id, watched for the loss of its peer."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self.endpoint = endpoint
        self.is_welcome = asyncio.Event()
        self.num_unanswered = 0
        """Pings since the router was last heard. Counted, not timed: time in which this process was stopped
        itself says nothing about the router."""
        self._is_stuck = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.routing_id = secrets.token_hex(8).encode()
        self._socket.reconnect_ivl = RECONNECT_MS
        self._socket.maxmsgsize = wire.MAX_MESSAGE_BYTES
        self._socket.sndhwm = MAX_WAITING_MESSAGES
        self._socket.rcvhwm = MAX_WAITING_MESSAGES
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED)

    def open(self) -> None:
        """Starts to connect and says hello. Raises `RouterLost` for an endpoint that cannot be one."""
        try:
            protect_client(self._socket, self.endpoint)
            self._socket.connect(self.endpoint)
        except ConfigurationError as error:
            raise RouterLost(str(error)) from error
        except zmq.ZMQError as error:
            raise RouterLost(f"cannot connect: {error.strerror}") from error
        self.send(wire.Hello(wire.PROTOCOL_VERSION))

    def send(self, message: wire.ClientMessage) -> None:
        """Sends without waiting. If it cannot be sent, the connection is about to be given up."""
        sent = self._socket.send(wire.encode(message), flags=zmq.DONTWAIT)
        # with DONTWAIT it is done already
        failure = cast("asyncio.Future[object]", sent).exception()
        self._is_stuck = self._is_stuck or failure is not None

    async def receive(self) -> wire.RouterMessage:
        """The next message. Raises `msgspec.DecodeError`."""
        frame = await self._socket.recv()
        self.num_unanswered = 0
        return wire.decode_router_message(frame)

    async def watch(self) -> NoReturn:
        """Raises `RouterLost` as soon as the peer closed the connection or refused it."""
        event = await recv_monitor_message(self._monitor)
        raise RouterLost("connection refused" if event["event"] == zmq.EVENT_CLOSED else "connection lost")

    def ping(self, max_unanswered: int) -> None:
        """Asks for a sign of life. Raises `RouterLost` if too many such questions went unanswered."""
        if self._is_stuck or self.num_unanswered >= max_unanswered:
            raise RouterLost(f"silent for {max_unanswered * wire.PING_INTERVAL_S:g} s")
        self.num_unanswered += 1
        self.send(wire.Ping())

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=LINGER_MS)


async def terminate(context: zmq.asyncio.Context) -> None:
    """Returns when the context's sockets, all closed, have sent what they may and its threads have ended.

    After `TERMINATION_LIMIT_S` they are left behind: libzmq has been seen to wait for ever (see `RECONNECT_MS`), and
    nobody's program should hang for that.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wait() -> None:
        context.term()
        with contextlib.suppress(RuntimeError):  # the loop did not wait for us and is closed
            loop.call_soon_threadsafe(ended.set)

    # not one of the loop's own threads: Python would wait for it before it exits
    threading.Thread(target=wait, name="dejavu-termination", daemon=True).start()
    try:
        async with asyncio.timeout(TERMINATION_LIMIT_S):
            await ended.wait()
    except TimeoutError:
        logger.warning("libzmq did not let go of its sockets within %g s: left behind", TERMINATION_LIMIT_S)
