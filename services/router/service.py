"""Wiring of the router: sockets, membership, leadership. What it decides is in submissions, requests and dispatch."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from common import messages
from common.channel import Inbox
from common.etcd.client import EtcdClient
from common.keys import CLIENTS
from common.loop_monitor import LoopMonitor
from common.membership import Election, LeaderChanged, Membership
from common.messages import (
    REPEAT_S,
    Beat,
    Orphans,
    PipelineReady,
    SequenceFailed,
    SequencesUnknown,
    StatsReply,
    Stop,
    TokensProduced,
)
from common.model.spec import ModelSpec, load_spec
from common.peers import Peers, beat, understood
from common.presence import Presence, present
from common.process import own_incarnation
from common.service import DRAIN_SIGNAL, ServiceOptions, own_record
from common.text import TextCodec
from dejavu import wire
from dejavu.errors import ConfigurationError, ProtocolError
from services.router.admission import malformed, outline
from services.router.clients import RETURN_S, Clients
from services.router.cluster import Cluster, Listener
from services.router.commands import Commands
from services.router.dispatch import MOVE_S
from services.router.etcd_watch import watch_etcd
from services.router.inheritance import MAX_REPORT_S
from services.router.neighbours import Neighbours
from services.router.requests import Requests
from services.router.stats_queries import StatsQueries
from services.router.status import Journal
from services.router.submissions import Submissions

logger = logging.getLogger(__name__)

FAREWELL_S = 0.2
"""Time for the last answer to leave."""
MAX_UNREAD_MESSAGES = 65536
PORT_LIMIT_S = 2.0
"""So long a port may be taken that should be ours."""
PORT_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class RouterOptions(ServiceOptions):
    """The command line of a router."""

    port: int
    may_kill: bool


class RouterService:
    """One router. Use `await RouterService.serve(options, stop)`."""

    def __init__(self, options: RouterOptions, spec: ModelSpec, codec: TextCodec | None) -> None:
        self._options = options
        self._spec = spec
        self._incarnation = own_incarnation()
        self._peers = Peers(f"{options.name}.{self._incarnation}")
        self._journal = Journal()
        self._neighbours = Neighbours()
        self._requests = Requests(spec, codec, self, self._journal, self._incarnation)
        self._dispatch = self._requests.dispatch
        self._clients = Clients()
        self._submissions = Submissions(self._requests, self._clients, self, self._other_leader, self._in_background)
        self._monitor = LoopMonitor()
        self._queries = StatsQueries(options.name, self._peers.send)
        self._is_live = False
        """about to register; before that there is nothing to say to anybody"""
        self._cluster: Cluster
        self._commands: Commands
        self._stop: asyncio.Event
        self._public: Inbox
        self._tasks: asyncio.TaskGroup

    @classmethod
    async def serve(cls, options: RouterOptions, stop: asyncio.Event) -> None:
        """Runs a router until `stop` is set. Raises `ConfigurationError` (port in use, bad model)."""
        spec = load_spec(options.model, options.dtype)
        for remark in spec.generation.remarks():
            logger.warning("%s", remark)
        service = cls(options, spec, TextCodec.load(options.model))
        async with asyncio.TaskGroup() as service._tasks:
            await service._run(stop)

    # ------------------------------------------------------------ Wires

    def to_client(self, client: bytes, message: wire.RouterMessage) -> None:
        self._public.send(client, wire.encode(message))

    def to_member(self, name: str, message: messages.Message) -> bool:
        return self._peers.send(name, message)

    # ------------------------------------------------------------ life

    async def _run(self, stop: asyncio.Event) -> None:
        options = self._options
        self._public = await self._listen(f"tcp://{options.host}:{options.port or '*'}")
        self._public.pause()
        try:
            async with present(options, self._peers, self._on_service_frames) as presence:
                await self._live(presence, stop)
        finally:
            self._public.close()
            self._neighbours.close()

    async def _listen(self, address: str) -> Inbox:
        """Waits a little for a port that is taken: a client that kept trying it while we were dead may have met itself
        there. Raises `ConfigurationError`."""
        deadline_s = time.monotonic() + PORT_LIMIT_S
        while True:
            try:
                return await Inbox.bind(
                    address,
                    self._on_client_frames,
                    self._on_client_gone,
                    wire.MAX_MESSAGE_BYTES,
                    MAX_UNREAD_MESSAGES,
                    CLIENTS,
                )
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline_s:
                    raise ConfigurationError(f"cannot listen on {address}: {error.strerror}", field="port") from error
            await asyncio.sleep(PORT_RETRY_S)

    async def _live(self, presence: Presence, stop: asyncio.Event) -> None:
        endpoint, etcd, membership = presence
        self._stop = stop
        self._join(etcd, membership)
        # whoever has sequences of a router before us is waited for
        for pipeline in (await membership.pipelines()).values():
            self._dispatch.pipeline_published(pipeline)
        # from its registration on others tell it things once and never again
        self._is_live = True
        detail = {"client_endpoint": self._public.endpoint}
        await membership.register(own_record(self._options.name, "router", self._incarnation, endpoint, detail))
        beating = beat(self._peers, self._cluster.other_routers, self._options.name, self._incarnation, lambda: 0.0)
        watching = (watch_etcd(etcd, self._journal), self._watch_clients(), self._ask_again(), self._monitor.watch())
        work = (self._cluster.run(), self._hear_clients(), beating, *watching)
        tasks = [self._tasks.create_task(each) for each in work]
        asyncio.get_running_loop().add_signal_handler(DRAIN_SIGNAL, self._submissions.close)
        logger.info("listening for clients on %s", self._public.endpoint)
        await stop.wait()
        for task in tasks:
            task.cancel()

    def _join(self, etcd: EtcdClient, membership: Membership) -> None:
        options = self._options
        self._cluster = Cluster(
            options.name,
            membership,
            Election(etcd, options.cluster, membership.lease, options.name, self._public.endpoint),
            self._peers,
            self._journal,
            self._neighbours,
            Listener(
                on_record=self._dispatch.pipeline_published,
                on_lost=self._pipeline_lost,
                on_lead=self._lead,
                on_leader=self._submissions.leader_changed,
                is_ready=self._dispatch.is_ready,
            ),
            may_kill=options.may_kill,
        )
        self._commands = Commands(
            options.name, self._cluster, self._requests, self._journal, self._queries, self._monitor
        )

    def _lead(self, before: LeaderChanged, since: int) -> None:
        self._dispatch.lead(since, before.fencing_revision)
        if before.name:
            self._dispatch.succeed(before.name)
            asyncio.get_running_loop().call_later(MAX_REPORT_S, self._stop_awaiting)

    def _stop_awaiting(self) -> None:
        if not self._dispatch.stop_awaiting():
            asyncio.get_running_loop().call_later(MAX_REPORT_S, self._stop_awaiting)

    def _pipeline_lost(self, name: str) -> None:
        self._dispatch.pipeline_lost(name)
        asyncio.get_running_loop().call_later(MOVE_S, self._dispatch.move_from, name)

    async def _hear_clients(self) -> None:
        """Who comes before is heard then, and is neither sent astray nor left without an answer."""
        await self._cluster.knows_leader.wait()
        self._public.resume()

    async def _watch_clients(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for client in self._clients.silent(time.monotonic()):
                self._clients.gone(client, had_requests=bool(self._requests.ledger.of_client(client)))
                self._give_up(client)

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(REPEAT_S)
            self._dispatch.ask_again()

    # ------------------------------------------------------------ clients

    def _on_client_gone(self, client: bytes) -> None:
        """Nothing can be sent to it. Who lives is soon back on another connection, and goes on where it was."""
        if self._clients.gone(client, had_requests=bool(self._requests.ledger.of_client(client))):
            asyncio.get_running_loop().call_later(RETURN_S, self._give_up, client)

    def _give_up(self, client: bytes) -> None:
        if client not in self._clients:
            self._requests.client_gone(client)

    def _on_client_frames(self, client: bytes, frames: list[memoryview]) -> None:
        if not self._is_live or not self._clients.heard(client, time.monotonic()):
            return
        try:
            if len(frames) != 1:
                raise msgspec.DecodeError("one frame expected")
            message = wire.decode_client_message(frames[0])
        except msgspec.DecodeError as error:
            self._refuse_bad_frame(client, frames, str(error))
            return
        if self._clients.is_back(client) and not isinstance(message, wire.Hello):
            self._welcome(client)  # it asks again for all that it still waits for
        if isinstance(message, wire.Hello):
            self._clients.greeted(client, message.protocol_version)
        refusal = self._clients.refusal(client)
        if refusal is not None:
            self._refuse_stranger(client, message, refusal)
            return
        match message:
            case wire.Hello():
                self._welcome(client)
            case wire.Submit():
                self._submissions.submit(client, message)
            case wire.Cancel():
                self._submissions.cancel(client, message.request_id)
            case wire.Ping():
                self.to_client(client, wire.Pong())
            case wire.StatusQuery(query_id):
                self._tasks.create_task(self._answer(client, self._commands.status(query_id)))
            case wire.Drain() | wire.Convert() if not self._cluster.is_leader:
                self.to_client(client, wire.NotLeader("", self._other_leader() or ""))
            case wire.Drain():
                self._tasks.create_task(self._drain(client, message))
            case wire.Convert():
                self._tasks.create_task(self._answer(client, self._commands.convert(message)))

    def _refuse_bad_frame(self, client: bytes, frames: list[memoryview], reason: str) -> None:
        """A frame that is no valid message. A malformed submit still names its request: say so to that request."""
        self._journal.counters["bad_frames"] += 1
        tag, request_id = outline(frames[0]) if frames else ("", "")
        self._requests.refuse(client, request_id, malformed(reason, tag))

    def _refuse_stranger(self, client: bytes, message: wire.ClientMessage, refusal: ProtocolError) -> None:
        """A client of another protocol version. Every version reads a welcome, and compares what that says with its
        own; one that does not gets the same error for whatever it asks."""
        if isinstance(message, wire.Hello):
            self._journal.counters["refused_clients"] += 1
            self._welcome(client)
        self._requests.refuse(client, message.request_id if isinstance(message, wire.Submit) else "", refusal)

    def _welcome(self, client: bytes) -> None:
        routers = {
            m.name: str(m.detail.get("client_endpoint")) for m in self._cluster.members.values() if m.role == "router"
        }
        self.to_client(
            client,
            wire.Welcome(
                wire.PROTOCOL_VERSION,
                sorted(routers.values()) or [self._public.endpoint],
                routers.get(self._cluster.leader, ""),
                self._spec.name,
                self._spec.vocab_size,
                self._spec.max_context_tokens,
            ),
        )

    # ------------------------------------------------------------ services

    def _on_service_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        if not self._is_live:
            return
        match message := understood(messages.decode_router_inbox, peer, frames, self._journal.counters):
            case Stop():
                self._stop.set()
            case PipelineReady():
                self._dispatch.reported_ready(message)
            case Beat(name, incarnation, overdue_s):
                self._cluster.watchdog.heard(name, incarnation, overdue_s, time.monotonic())
            case TokensProduced():
                self._requests.tokens_produced(message)
            case Orphans():
                self._dispatch.orphans_found(message)
            case SequenceFailed():
                self._requests.sequence_failed(message)
            case SequencesUnknown():
                self._dispatch.sequences_unknown(message)
            case StatsReply():
                self._queries.answered(message)

    async def _drain(self, client: bytes, drain: wire.Drain) -> None:
        drained = await self._commands.drain(drain)
        self.to_client(client, drained)
        if drain.name == self._options.name and drained.error is None:
            asyncio.get_running_loop().call_later(FAREWELL_S, self._stop.set)

    async def _answer(self, client: bytes, answer: Awaitable[wire.RouterMessage]) -> None:
        self.to_client(client, await answer)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)

    def _other_leader(self) -> str | None:
        """Where another router that leads listens for clients; '' if none is known to lead, None: we do."""
        if self._cluster.is_leader:
            return None
        leader = self._cluster.members.get(self._cluster.leader)
        is_other = leader is not None and leader.incarnation != self._incarnation
        return str(leader.detail.get("client_endpoint")) if leader is not None and is_other else ""
