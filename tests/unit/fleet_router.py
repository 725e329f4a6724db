"""A router among several pipelines: what it decides and says to others is the real thing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.membership import MemberJoined, MemberLost, PipelineRecord
from common.messages import Admit, Message
from dejavu.wire import RouterMessage, Tokens
from services.router.pipelines import is_spare
from services.router.service import RouterOptions, RouterService
from tests.unit.fleet_stages import SPEC, FleetPeers, drive

if TYPE_CHECKING:
    from tests.unit.fleet_world import Fleet


class FleetRouter(RouterService):
    """A router as it is served; who leads is said by the world."""

    def __init__(self, world: Fleet, name: str, incarnation: str) -> None:
        super().__init__(RouterOptions(name, "", "c", "h", "", "", 0, may_kill=True), SPEC, None)
        self.world, self.name, self.incarnation = world, name, incarnation
        self._incarnation = self._dispatch._incarnation = incarnation
        self._peers = FleetPeers(world, f"{name}.{incarnation}")
        self.cluster = self._cluster = cast(Any, SimpleNamespace(members={}, records={}, is_leader=False, leader=""))
        self._is_live = True

    @property
    def requests(self) -> Any:
        return self._requests

    def to_client(self, client: bytes, message: RouterMessage) -> None:
        for frame in message.frames if isinstance(message, Tokens) else ():
            # one that was repeated to a client that has come back may be of an epoch before
            known = self.world.homes[f"{frame.request_id}/{frame.choice}"]
            assert frame.epoch <= known[1], "a zombie was heard"
        self.world.to_clients.append((self.incarnation, client.decode(), message))

    def to_member(self, name: str, message: Message) -> bool:
        if isinstance(message, Admit):
            self.world.admitted(name, message)
        return super().to_member(name, message)

    def arrive(self, peer: str, frame: bytes) -> None:
        self._on_service_frames(peer.encode(), [memoryview(frame)])

    def remind(self) -> None:
        self._dispatch.ask_again()

    def can_hear(self, kind: str) -> bool:
        return True

    def ways(self) -> list[Callable[[], None]]:
        return []

    def hear(self, kind: str, event: Any) -> None:
        if isinstance(event, PipelineRecord):
            if event.successor is None:
                drive(self._peers.connect(event.stages[0].name, event.stages[0].endpoint))
            self.cluster.records[event.pipeline] = event
            self._dispatch.pipeline_published(event)
        elif isinstance(event, MemberJoined):
            drive(self._peers.connect(event.record.name, event.record.endpoint))
            self.cluster.members[event.record.name] = event.record
        elif isinstance(event, MemberLost):
            record = event.record
            if self.cluster.members.get(record.name) is record:
                del self.cluster.members[record.name]
            self._peers.drop(record.name, record.endpoint)
            if record.pipeline is not None and not is_spare(record, self.cluster.records):
                self.requests.dispatch.pipeline_lost(record.pipeline)
