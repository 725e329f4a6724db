"""A client's life with its routers: it connects, submits, keeps alive, and moves on when a router is lost.

There are two states: *trying* an endpoint until its router says welcome; *served* by it until that router is
lost (closed, silent, not the leader). Then the next endpoint is tried. Live requests wait meanwhile and are
submitted again, under their ids and with the tokens they have, to whichever router says welcome next.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import assert_never, cast

import msgspec
import zmq.asyncio

from dejavu import wire
from dejavu.connection import Connection, OtherVersion, RouterLost, terminate
from dejavu.endpoints import RouterList
from dejavu.errors import (
    DejavuError,
    ProtocolError,
    RequestCancelled,
    RequestConflict,
    Unavailable,
    error_from_wire,
)
from dejavu.live_request import LiveRequest
from dejavu.types import Token

MAX_UNANSWERED_PINGS = 4
HANDSHAKE_LIMIT_S = 1.0
MAX_BURST = 16
"""Messages handled before others get a turn: receiving what is already there does not yield by itself."""
DRAIN_LIMIT_S = 60.0
RETRY_PAUSES_S = (0.02, 0.04, 0.1)
"""Between two rounds through all known routers: soon after a loss another one may lead already."""
SERVED_S = 1.0
"""A router that was there for so long has served us, and the rounds begin anew."""
_Question = wire.StatusQuery | wire.Drain | wire.Convert
_Answer = wire.StatusReply | wire.Drained | wire.Converted


class Session:
    """Live requests and the connection that serves them, run by one task. Use from one event loop."""

    def __init__(self, endpoints: Sequence[str], connect_timeout_s: float, outage_limit_s: float) -> None:
        self.welcome: wire.Welcome | None = None
        self._outage_limit_s = outage_limit_s
        self._connect_timeout_s = connect_timeout_s
        self._routers = RouterList(endpoints)
        self._losses: dict[str, RouterLost] = {}
        self._live: dict[str, LiveRequest] = {}
        self._queries: dict[int, tuple[_Question, asyncio.Future[_Answer]]] = {}
        self._num_queries = 0
        self._left: Counter[str] = Counter()
        """ids of requests that were left and whose end this connection still owes us: until it comes, what is said of
        such an id is not about a later request with the same"""
        self._connection: Connection | None = None
        self._opened: asyncio.Future[None]
        self._context: zmq.asyncio.Context | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    # ------------------------------------------------------------ for the client

    async def open(self) -> None:
        """Returns when a router said welcome. Raises `Unavailable`, and `ProtocolError` where all routers that are
        known speak another version of the protocol."""
        self._is_closing = False
        self._opened = asyncio.get_running_loop().create_future()
        is_open = False
        self._context = zmq.asyncio.Context()
        self._task = asyncio.create_task(self._run(self._context), name="dejavu-client")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._opened
            is_open = True
        except TimeoutError:
            raise self._unavailable(self._connect_timeout_s) from None
        finally:
            if not is_open:
                await self.aclose()

    async def aclose(self) -> None:
        """Cancels what is live, tells the router, and lets go of every socket and thread."""
        task, context = self._task, self._context
        self._task = self._context = None
        if task is None or context is None:
            return
        for request_id in self._live:
            self._send(wire.Cancel(request_id))
        self._is_closing = True
        task.cancel()
        await asyncio.wait([task])
        await terminate(context)
        if not task.cancelled():
            task.result()

    async def tokens(self, live: LiveRequest) -> AsyncGenerator[Token, None]:
        """Submits the request and yields its tokens; closing it cancels the request. Raises `DejavuError`."""
        self._enter(live)
        try:
            while (token := await live.take()) is not None:
                yield token
        finally:
            self._leave(live)

    async def status(self) -> bytes:
        """The status document of the router, as JSON. Raises `Unavailable`."""
        reply = await self._ask(wire.StatusQuery, self._connect_timeout_s)
        assert isinstance(reply, wire.StatusReply)
        return reply.status_json

    async def drain(self, name: str) -> None:
        """Has a service replaced and ended. Raises `DejavuError`."""
        reply = await self._ask(lambda query_id: wire.Drain(query_id, name), DRAIN_LIMIT_S)
        assert isinstance(reply, wire.Drained)
        _raise(reply.error)

    async def convert(self, pipeline: str, role: str) -> str:
        """Has a pipeline change its role; returns its new name. Raises `DejavuError`."""
        reply = await self._ask(lambda query_id: wire.Convert(query_id, pipeline, role), DRAIN_LIMIT_S)
        assert isinstance(reply, wire.Converted)
        _raise(reply.error)
        return reply.pipeline

    async def _ask(self, new_query: Callable[[int], _Question], limit_s: float) -> _Answer:
        """Asks whichever router serves us, again after each loss of one. Raises `Unavailable`."""
        self._check_open()
        self._num_queries += 1
        query = new_query(self._num_queries)
        reply: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._queries[query.query_id] = (query, reply)
        self._send(query)
        try:
            async with asyncio.timeout(limit_s):
                return await reply
        except TimeoutError:
            raise self._unavailable(limit_s) from None
        finally:
            del self._queries[query.query_id]

    def cancel(self, request_id: str) -> None:
        """Asks the router to cancel a request of any client. Raises `Unavailable` where there is none."""
        self._check_open()
        live = self._live.get(request_id)
        if live is not None:
            live.is_cancelled = True
        if self._connection is not None:
            self._send(wire.Cancel(request_id))
        elif live is not None:
            self._fail(live, RequestCancelled(f"{request_id} was cancelled"))
        else:
            raise self._unavailable(0.0)

    # ------------------------------------------------------------ requests

    def _check_open(self) -> None:
        if self._task is None or self._task.done():
            raise RuntimeError("the client is not connected: use `async with AsyncClient(...) as client`")

    def _enter(self, live: LiveRequest) -> None:
        self._check_open()
        if live.request_id in self._live:
            raise RequestConflict("another request with this id is live", field="request_id")
        live.unanswered_since_s = asyncio.get_running_loop().time()
        self._live[live.request_id] = live
        self._send(live.submission())

    def _leave(self, live: LiveRequest) -> None:
        """The user takes no more of it."""
        if not live.has_ended:
            self._give_up(live, RequestCancelled(f"{live.request_id} was left"))

    def _fail(self, live: LiveRequest, error: DejavuError) -> None:
        live.fail(error)
        del self._live[live.request_id]

    def _give_up(self, live: LiveRequest, error: DejavuError) -> None:
        self._fail(live, error)
        if self._connection is not None:
            self._left[live.request_id] += 1
            self._send(wire.Cancel(live.request_id))

    def _submit_again(self, live: LiveRequest) -> None:
        """To a router that just said welcome."""
        if live.is_cancelled:
            self._send(wire.Cancel(live.request_id))
            self._fail(live, RequestCancelled(f"{live.request_id} was cancelled"))
        elif live.is_complete:
            live.finish(live.usage.num_output_tokens)
            del self._live[live.request_id]
        else:
            self._send(live.submission())

    def _send(self, message: wire.ClientMessage) -> None:
        """Sends if a router serves us; if none does, the next welcome sends what still matters."""
        if self._connection is not None:
            self._connection.send(message)

    # ------------------------------------------------------------ the one task

    async def _run(self, context: zmq.asyncio.Context) -> None:
        loop, num_failed = asyncio.get_running_loop(), 0
        try:
            # a flag beside the cancellation: before Python 3.13 a task group that is failing swallows it
            while not self._is_closing:
                endpoint, began_s = self._routers.next(), loop.time()
                self._note_loss(endpoint, await self._try(Connection(context, endpoint)))
                num_failed = 0 if loop.time() - began_s > SERVED_S else num_failed + 1
                num_rounds, rest = divmod(num_failed, len(self._routers))
                if num_rounds and not rest:
                    self._refuse_to_open()
                    await asyncio.sleep(RETRY_PAUSES_S[min(num_rounds, len(RETRY_PAUSES_S)) - 1])
        finally:
            for live in list(self._live.values()):
                self._fail(live, RequestCancelled("the client was closed"))

    async def _try(self, connection: Connection) -> RouterLost:
        """Lives with one router until it is lost; returns why."""
        reason = RouterLost("")
        try:
            connection.open()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(connection.watch())
                tasks.create_task(self._receive(connection))
                tasks.create_task(self._keep_alive(connection))
        except* RouterLost as losses:
            reason = cast("RouterLost", losses.exceptions[0])
        finally:
            self._connection = None
            connection.close()
        return reason

    def _note_loss(self, endpoint: str, reason: RouterLost) -> None:
        self._losses[endpoint] = reason
        now_s = asyncio.get_running_loop().time()
        for live in list(self._live.values()):
            if live.unanswered_since_s is None:
                live.unanswered_since_s = now_s
            elif now_s - live.unanswered_since_s > self._outage_limit_s:
                self._fail(live, self._unavailable(self._outage_limit_s))

    def _refuse_to_open(self) -> None:
        """There is nothing to wait for where nobody speaks our version."""
        if not self._opened.done() and all(isinstance(self._losses.get(each), OtherVersion) for each in self._routers):
            tried = ", ".join(f"{router} ({self._losses[router]})" for router in self._routers)
            self._opened.set_exception(ProtocolError(f"no router speaks this client's protocol: {tried}"))

    def _unavailable(self, waited_s: float) -> Unavailable:
        tried = ", ".join(f"{router} ({self._losses.get(router, 'no answer')})" for router in self._routers)
        return Unavailable(
            f"no router served this client within {waited_s:g} s: {tried}. "
            "Start the system with `dejavu serve`, or name a running one with --endpoint or DEJAVU_ENDPOINT"
        )

    async def _keep_alive(self, connection: Connection) -> None:
        limit_s = min(HANDSHAKE_LIMIT_S, self._connect_timeout_s / len(self._routers))
        try:
            async with asyncio.timeout(limit_s):
                await connection.is_welcome.wait()
        except TimeoutError:
            raise RouterLost("no answer") from None
        while True:
            await asyncio.sleep(wire.PING_INTERVAL_S)
            if self._live or self._queries:
                connection.ping(MAX_UNANSWERED_PINGS)

    async def _receive(self, connection: Connection) -> None:
        for num_received in itertools.count(1):
            if num_received % MAX_BURST == 0:
                await asyncio.sleep(0)
            try:
                message = await connection.receive()
            except msgspec.DecodeError as error:
                reason = f"malformed message: {error}"
                # from whom requests were sent to, asking again would bring the same: better an error than an endless
                # loop. Before the welcome it may be anybody, on a dead router's port even this socket itself
                if connection.is_welcome.is_set():
                    for live in list(self._live.values()):
                        self._fail(live, ProtocolError(reason))
                raise RouterLost(reason) from error
            self._handle(connection, message)

    def _handle(self, connection: Connection, message: wire.RouterMessage) -> None:
        match message:
            case wire.Tokens(frames):
                for frame in frames:
                    self._deliver(frame)
            case wire.Accepted(request_id, num_prompt_tokens):
                if request_id in self._live and request_id not in self._left:
                    self._live[request_id].accept(num_prompt_tokens)
            case wire.Ended(request_id):
                if request_id in self._left:
                    self._left -= Counter([request_id])  # what has come to 0 is gone
                elif request_id in self._live:
                    self._live.pop(request_id).end(message)
            case wire.NotLeader(request_id, leader):
                if request_id in self._live or (not request_id and self._queries):
                    self._redirect(leader)
            case wire.StatusReply() | wire.Drained() | wire.Converted():
                _, reply = self._queries.get(message.query_id, (None, None))
                if reply is not None and not reply.done():
                    reply.set_result(message)
            case wire.Welcome():
                self._be_served(connection, message)
            case wire.Pong():
                pass
            case _:
                assert_never(message)

    def _deliver(self, frame: wire.TokenFrame) -> None:
        live = self._live.get(frame.request_id)
        if live is None or frame.request_id in self._left:
            return
        try:
            live.deliver(frame)
        except ProtocolError as error:
            self._give_up(live, error)

    def _redirect(self, leader: str) -> None:
        if leader:
            self._routers.prefer(leader)
        raise RouterLost(f"not the leader, which is {leader}" if leader else "knows of no leader")

    def _be_served(self, connection: Connection, welcome: wire.Welcome) -> None:
        if welcome.protocol_version != wire.PROTOCOL_VERSION:
            raise OtherVersion(f"speaks protocol {welcome.protocol_version}, not {wire.PROTOCOL_VERSION}")
        self.welcome = welcome
        self._routers.learn(welcome.routers)
        self._losses.clear()
        self._left.clear()
        self._connection = connection
        connection.is_welcome.set()
        if not self._opened.done():
            self._opened.set_result(None)
        for query, _ in self._queries.values():
            self._send(query)
        for live in list(self._live.values()):
            self._submit_again(live)


def _raise(error: wire.WireError | None) -> None:
    if error is not None:
        raise error_from_wire(error.code, error.message, error.field, error.details)
