"""What a router knows of the cluster and, when it leads, decides for it: who lives, who stands in for whom."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.etcd.errors import EtcdUnavailable
from common.membership import (
    NOBODY,
    Election,
    LeaderChanged,
    MemberJoined,
    MemberLost,
    MemberRecord,
    Membership,
    PipelineRecord,
)
from common.messages import Stop
from common.peers import Peers
from common.succession import is_retired
from dejavu.errors import InvalidParameter, Unavailable
from services.router.evictions import Evictions
from services.router.neighbours import Neighbours
from services.router.pipelines import is_spare, missing_pipelines, stand_in
from services.router.status import Journal
from services.router.watchdog import TICK_S, Suspicion, Watchdog

logger = logging.getLogger(__name__)

RETRY_S = 0.5
DRAIN_LIMIT_S = 20.0
CONFIRM_LIMIT_S = 0.15
"""For etcd to say whom others see: nobody is judged meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """What a router wants to hear: `on_record(record)` of every publication, `on_lost(pipeline)` of a pipeline that has
    lost a stage, `on_lead(before, since)` that we lead after `before` (nobody, maybe) since that revision of etcd,
    `on_leader()` that somebody else leads, or nobody, or we; and what it tells: `is_ready(pipeline)`, whether it works
    again."""

    on_record: Callable[[PipelineRecord], None]
    on_lost: Callable[[str], None]
    on_lead: Callable[[LeaderChanged, int], None]
    on_leader: Callable[[], None]
    is_ready: Callable[[str], bool]


class Cluster:
    """Members, published pipelines and the leader. `neighbours` are the members of this machine."""

    def __init__(
        self,
        name: str,
        membership: Membership,
        election: Election,
        peers: Peers,
        journal: Journal,
        neighbours: Neighbours,
        listener: Listener,
        *,
        may_kill: bool,
    ) -> None:
        self.members: dict[str, MemberRecord] = {}
        self.records: dict[str, PipelineRecord] = {}
        self.leader, self.is_leader = "", False
        self.knows_leader = asyncio.Event()
        """set once"""
        self._name = name
        self._membership = membership
        self._election = election
        self._peers = peers
        self._journal = journal
        self._neighbours = neighbours
        self._may_kill = may_kill
        self._listener = listener
        # the last other process that led; until we know of one, it may be the one that had our name
        self._predecessor = LeaderChanged(name, "", 0, is_me=False)
        self._changed = asyncio.Event()
        self._draining: set[str] = set()  # incarnations that are to be replaced
        self._broken: set[str] = set()  # pipelines that have lost a stage since they were published
        self._converting = ""  # the pipeline that is being ended
        self._evicted: dict[str, str] = {}
        """the latest incarnation of each name that was taken for dead"""
        self._evictions = Evictions(membership)
        self._ended: set[str] = set()  # incarnations that were seen to end before etcd has said so
        self.watchdog = Watchdog(neighbours.is_stopped, neighbours.run_delay_s)

    async def run(self) -> None:
        """Follows and leads until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_members())
            tasks.create_task(self._watch_pipelines())
            tasks.create_task(self._election.campaign())
            tasks.create_task(self._watch_leader())
            tasks.create_task(self._form_pipelines())
            tasks.create_task(self._evictions.run())
            tasks.create_task(self._watch_pulses())

    def other_routers(self) -> list[str]:
        return [m.name for m in self.members.values() if m.role == "router" and m.name != self._name]

    # ------------------------------------------------------------ following

    async def _watch_members(self) -> None:
        async for event in self._membership.watch():
            match event:
                case MemberJoined(record) if record.incarnation not in self._ended:
                    self._neighbours.meet(record)
                    await self._peers.connect(record.name, record.endpoint)
                    if self._evicted.get(record.name) == record.incarnation:
                        del self._evicted[record.name]
                        self._journal.counters["false_failovers"] += 1
                    self.members[record.name] = record
                case MemberLost(record):
                    self._neighbours.part(record)
                    if record.incarnation in self._ended:
                        self._ended.discard(record.incarnation)
                    else:
                        self._lost(record)
            self._note_leader()
            self._changed.set()

    def _lost(self, record: MemberRecord) -> None:
        self.members.pop(record.name, None)
        self.watchdog.lost(record.name)
        self._peers.drop(record.name, record.endpoint)
        self._draining.discard(record.incarnation)
        kind = "left" if is_retired(record.pipeline or "", self.records) else "detected"
        self._journal.note(kind, record.name, role=record.role, pid=record.pid)
        if record.pipeline is not None and not is_spare(record, self.records):
            self._broken.add(record.pipeline)
            self._listener.on_lost(record.pipeline)

    async def _watch_pipelines(self) -> None:
        async for record in self._membership.watch_pipelines():
            if record.successor is None:  # its members may become known to us only later
                await self._peers.connect(record.stages[0].name, record.stages[0].endpoint)
            self.records[record.pipeline] = record
            self._broken.discard(record.pipeline)
            over = {} if record.successor is None else {"successor": record.successor}
            self._journal.note("decided", record.pipeline, epoch=record.epoch, **over)
            self._listener.on_record(record)
            self._changed.set()

    async def _watch_leader(self) -> None:
        async for leader in self._election.watch():
            if leader.is_me:
                self._listener.on_lead(self._predecessor, leader.fencing_revision)
            if leader.is_me or leader.name:
                self._predecessor = NOBODY if leader.is_me else leader
            self.leader = leader.name
            self.is_leader = leader.is_me
            self._journal.note("leader", leader.name)
            self._note_leader()
            self._listener.on_leader()
            self._changed.set()

    def _note_leader(self) -> None:
        if self.leader in self.members:
            self.knows_leader.set()

    # ------------------------------------------------------------ leading

    async def _form_pipelines(self) -> None:
        """The leader publishes every pipeline whose stages are all there and not yet the published ones."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self.is_leader:
                continue
            for record in missing_pipelines(self.members.values(), self.records, self._draining, self._broken):
                try:
                    await self._membership.publish_pipeline(record, self._election.guard())
                except EtcdUnavailable as error:
                    logger.warning("%s is published later: %s", record.pipeline, error)
                    asyncio.get_running_loop().call_later(RETRY_S, self._changed.set)

    async def _watch_pulses(self) -> None:
        """The leader watches everybody, the other routers watch the leader. Whom others may have let go of judges
        nobody, and when they have found us again they begin anew to speak to us."""
        judged_as: int | None = None
        while True:
            await asyncio.sleep(TICK_S)
            self._note_ends()
            standing, judged_as = judged_as, self._membership.standing()
            if judged_as is None or judged_as != standing or self._name not in self.members:
                self.watchdog.pause()
                continue
            others = [member for member in self.members.values() if member.name != self._name]
            watched = [member for member in others if self._may_judge(member)]
            suspicions = self.watchdog.suspects(watched, time.monotonic())
            if any(suspicion.is_silence for suspicion in suspicions) and not await self._is_surely_seen():
                suspicions = [suspicion for suspicion in suspicions if not suspicion.is_silence]
            for suspicion in suspicions:
                self._suspect(suspicion)

    async def _is_surely_seen(self) -> bool:
        """Who slept, or is cut off, may hear nothing because it has been replaced, and does not know that yet, or has
        come back only while it asked."""
        standing = self._membership.standing()
        try:
            is_confirmed = await self._membership.is_confirmed(CONFIRM_LIMIT_S)
        except EtcdUnavailable:
            return False
        return is_confirmed and standing is not None and standing == self._membership.standing()

    def _note_ends(self) -> None:
        """Who ends on this machine will not come back: nobody has to wait for etcd to hear of it. It is told by whoever
        would judge it, too."""
        for record in list(self.members.values()):
            if self._neighbours.is_ending(record):
                self._ended.add(record.incarnation)
                if self._may_judge(record):
                    self._evictions.begin(record, partial(self._may_judge, record))
                self._lost(record)
                self._changed.set()

    def _suspect(self, suspicion: Suspicion) -> None:
        """First the process is killed, where we can, so that it never wakes up again; then its lease is ended, which
        tells everybody."""
        record = suspicion.record
        if record in self._evictions:
            return
        logger.warning("%s (pid %d): %s", record.name, record.pid, suspicion.reason)
        self.watchdog.lost(record.name)
        self._evicted[record.name] = record.incarnation
        self._journal.note("suspected", record.name, reason=suspicion.reason, pid=record.pid)
        is_dead = self._may_kill and self._neighbours.kill(record)
        self._evictions.begin(
            record, lambda: self._may_judge(record) and (is_dead or not self.watchdog.is_well(record))
        )

    def _may_judge(self, member: MemberRecord) -> bool:
        return self.is_leader or member.name == self.leader

    async def drain(self, name: str) -> None:
        """Has another process take over from a member, then ends it in order. Returns when it is gone; raises
        `InvalidParameter` for a name that nobody has, `Unavailable` where nobody can take over."""
        record = self.members.get(name)
        if record is None:
            raise InvalidParameter(f"there is no service of this name: {', '.join(sorted(self.members))}", field="name")
        if record.role == "router" and not self.other_routers():
            raise Unavailable(f"{name} is the only router; start more with --routers")
        if record.pipeline is not None and not is_spare(record, self.records):
            if stand_in(record, self.members.values(), self._draining) is None:
                raise Unavailable(f"nobody can take over from {name}; keep spares with --standbys")
            self._draining.add(record.incarnation)
            self._changed.set()
            await self._until(lambda: is_spare(record, self.records) and self._listener.is_ready(str(record.pipeline)))
        self._journal.note("drained", name)
        if name != self._name:  # else the caller ends itself, once it has answered
            self._peers.send(name, Stop())
            await self._until(lambda: self.members.get(name) is not record)

    async def convert(self, end: PipelineRecord) -> None:
        """Has the processes of a pipeline form its successor, as `end` says. Returns when that works; raises
        `Unavailable`."""
        name, successor = end.pipeline, str(end.successor)
        if self._converting not in ("", name):
            raise Unavailable(f"{self._converting} is being converted; one after the other")
        if not self._converting and self.records[name].successor is None:
            self._converting = name
            try:
                await self._publish_end(end)
            finally:
                self._converting = ""
        await self._until(lambda: self._listener.is_ready(successor))
        self._journal.note("converted", name, successor=successor)

    async def _publish_end(self, end: PipelineRecord) -> None:
        try:
            epoch = await self._membership.publish_pipeline(end, self._election.guard())
        except EtcdUnavailable as error:
            raise Unavailable(f"{end.pipeline} stays as it is for now: {error}") from error
        if epoch is None:
            raise Unavailable(f"{end.pipeline} has just changed; try again")
        await self._until(lambda: self.records[end.pipeline].epoch >= epoch)

    async def _until(self, is_done: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(DRAIN_LIMIT_S):
                while not is_done():  # noqa: ASYNC110 - what is waited for comes from several places
                    await asyncio.sleep(TICK_S)
        except TimeoutError:
            raise Unavailable(f"not done within {DRAIN_LIMIT_S:g} s; see `dejavu status`") from None
