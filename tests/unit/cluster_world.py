"""Routers that lead, stages, stores and their parent on a virtual clock with a simulated etcd: the real membership,
election, watchdog, publishing and obituaries decide; what they send each other arrives a little later, or is lost."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from common.etcd.client import Put
from common.etcd.errors import EtcdUnavailable
from common.membership import Election, MemberRecord, Membership, MemberSuperseded, PipelineRecord
from common.messages import Beat, Message, Stop
from common.peers import beat
from deploy.obituary import Obituaries
from services.router.cluster import Cluster, Listener
from services.router.neighbours import Neighbours
from services.router.status import Journal
from tests.unit.simulated_etcd import SimulatedClient, SimulatedEtcd
from tests.unit.simulated_peers import KnownPeers
from tests.unit.virtual_time import Process

CLUSTER = "c"
LISTENER = Listener(
    on_record=lambda record: None,
    on_lost=lambda pipeline: None,
    on_lead=lambda router, since: None,
    on_leader=lambda: None,
    is_ready=lambda pipeline: True,
)
AFTERMATH_S = 1.5
"""so long after something was done to a process it may be suspected"""
FORGOTTEN_S = 60.0
"""... and be taken for dead: its lease may have lapsed"""
RESPAWN_S = (1.0, 2.0)
NUM_ROUTERS = 3


@dataclass(frozen=True)
class Role:
    """A service that is kept alive: what its record says."""

    name: str
    role: str
    pipeline: str | None = None
    stage_index: int | None = None
    num_stages: int | None = None
    layers: tuple[int, int] | None = None
    state: str = "active"


def _stages(pipeline: str, role: str, state: str, suffix: str = "") -> list[Role]:
    return [
        Role(f"{pipeline}-{index}{suffix}", role, pipeline, index, 2, (index, index + 1), state) for index in range(2)
    ]


ROLES = [
    *(Role(f"router-{index}", "router") for index in range(NUM_ROUTERS)),
    *_stages("token-0", "token_stage", "active"),
    *_stages("token-0", "token_stage", "standby", "-spare"),
    *_stages("prompt-0", "prompt_stage", "active"),
    Role("store-0", "cache_store"),
]


class SimulatedPeers(KnownPeers):
    """Messages to members reach their process some milliseconds later; those of the dead and the cut off are lost."""

    def __init__(self, process: Process, world: ClusterWorld) -> None:
        super().__init__(process.name)
        self._process = process
        self._world = world

    def send(self, name: str, message: Message, payload: object = None) -> bool:
        if name not in self._known:
            return False
        self._world.deliver(self._process, name, message)
        return True


class SimulatedNeighbours(Neighbours):
    """What the operating system says of simulated processes."""

    def __init__(self, world: ClusterWorld) -> None:
        super().__init__()
        self._world = world

    def meet(self, record: MemberRecord) -> None:
        pass

    def is_ending(self, record: MemberRecord) -> bool:
        return self._world.sees_ends and self._world.by_pid[record.pid].process.is_dead

    def is_stopped(self, record: MemberRecord) -> bool:
        return self._world.by_pid[record.pid].process.is_stopped

    def run_delay_s(self, record: MemberRecord) -> float:
        return 0.0

    def kill(self, record: MemberRecord) -> bool:
        self._world.kill(self._world.by_pid[record.pid])
        return True


@dataclass
class Life:
    """A process of a service, from its start to its end."""

    role: Role
    process: Process
    client: SimulatedClient
    cluster: Cluster | None = None
    record: MemberRecord | None = None
    ails_until_s: float = -math.inf
    """for ever, once it is dead"""

    def ail(self, until_s: float) -> None:
        """Something is done to it, and it may still suffer from what was done before."""
        self.ails_until_s = max(self.ails_until_s, until_s)


class WatchedJournal(Journal):
    """What a router thinks of others is checked at the moment in which it thinks so: whom it kills is dead then."""

    def __init__(self, on_note: Callable[[str, str, dict[str, Any]], None]) -> None:
        super().__init__()
        self._on_note = on_note

    def note(self, kind: str, service: str, **details: Any) -> None:
        super().note(kind, service, **details)
        self._on_note(kind, service, details)


class ClusterWorld:
    """`lives` are the present processes by name; `violations` what must not have happened."""

    def __init__(self, seed: int, *, may_kill: bool = True) -> None:
        self.draws = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self.etcd = SimulatedEtcd(self.draws, self._check_write)
        self.lives: dict[str, Life] = {}
        self.violations: list[str] = []
        self.published: list[tuple[float, PipelineRecord]] = []
        self._may_kill = may_kill
        self._num_pids = 0
        self.by_pid: dict[int, Life] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.background: asyncio.Task[None] | None = None
        parent = Process("parent", "0", 0)
        self._obituaries = Obituaries("http://simulated:1", CLUSTER)
        self._obituaries._client = SimulatedClient(self.etcd, parent)
        self.sees_ends = self.draws.random() < 0.5
        """what routers can see of who ends, as if they were on one machine with it"""

    @property
    def now_s(self) -> float:
        return time.monotonic()

    # ------------------------------------------------------------ processes

    def start(self, role: Role) -> None:
        self._num_pids += 1
        process = Process(role.name, f"{self._num_pids}-{self._num_pids}", self._num_pids)
        life = Life(role, process, SimulatedClient(self.etcd, process))
        self.lives[role.name] = self.by_pid[process.pid] = life
        process.start(self._live(life))

    async def _live(self, life: Life) -> None:
        role, process = life.role, life.process
        life.record = MemberRecord(
            role.name, role.role, process.incarnation, process.pid, socket.gethostname(),
            f"tcp://h:{process.pid}", role.pipeline, role.stage_index, role.num_stages, role.layers, role.state,
        )  # fmt: skip
        # without etcd it cannot begin, and where another incarnation has its name it must end
        with suppress(MemberSuperseded, EtcdUnavailable):
            async with Membership(life.client, CLUSTER) as membership, asyncio.TaskGroup() as tasks:
                if role.role == "router":
                    life.cluster = self._cluster(life, membership)
                    routers = life.cluster.other_routers
                else:
                    routers = lambda: [name for name, other in self.lives.items() if other.role.role == "router"]  # noqa: E731
                await membership.register(life.record)
                peers = SimulatedPeers(process, self)
                for name in routers() if life.cluster is None else []:
                    await peers.connect(name, "")
                mine = life.cluster._peers if life.cluster is not None else peers
                process_beats = beat(mine, routers, role.name, process.incarnation, lambda: 0.0)
                tasks.create_task(process_beats)
                if life.cluster is not None:
                    tasks.create_task(life.cluster.run())
        if not process.is_dead:
            self.bury(life)

    def _cluster(self, life: Life, membership: Membership) -> Cluster:
        election = Election(life.client, CLUSTER, membership.lease, life.role.name, f"tcp://h:{life.process.pid}")
        journal = WatchedJournal(self._check_judgement)
        return Cluster(
            life.role.name, membership, election, SimulatedPeers(life.process, self), journal,
            SimulatedNeighbours(self), LISTENER, may_kill=self._may_kill,
        )  # fmt: skip

    def kill(self, life: Life) -> None:
        """Its parent notices, tells it, and starts it again."""
        if life.process.is_dead:
            return
        life.process.kill()
        self.bury(life)

    def bury(self, life: Life) -> None:
        life.process.is_dead = True
        life.ail(math.inf)
        self._obituaries.report(life.process.incarnation)
        if self.lives.get(life.role.name) is life:
            self._later(self.draws.uniform(*RESPAWN_S), lambda: self.start(life.role))

    def stop(self, life: Life, duration_s: float) -> None:
        life.ail(self.now_s + duration_s)
        life.process.stop()
        self._later(duration_s, life.process.go_on)

    def cut_off(self, life: Life, duration_s: float) -> None:
        """From etcd alone."""
        life.ail(self.now_s + duration_s)
        life.client.is_cut_off = True

        def mend() -> None:
            life.client.is_cut_off = False

        self._later(duration_s, mend)

    def etcd_outage(self, duration_s: float, *, was_stopped: bool) -> None:
        self.etcd.go_down()

        self._later(duration_s, lambda: self.etcd.come_up(was_stopped=was_stopped))

    def _later(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._loop.call_later(delay_s, happen)

    # ------------------------------------------------------------ messages

    def deliver(self, sender: Process, name: str, message: Message) -> None:
        self._later(self.draws.uniform(0.0002, 0.002), lambda: self._arrive(sender, name, message))

    def _arrive(self, sender: Process, name: str, message: Message) -> None:
        life = self.lives.get(name)
        if sender.is_stopped or (life is not None and life.process.is_stopped):
            task = asyncio.create_task(self._wait_for_both(sender, name, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif life is not None:
            self._take(sender, life, message)

    async def _wait_for_both(self, sender: Process, name: str, message: Message) -> None:
        await sender.turn()
        life = self.lives.get(name)
        if life is not None and not life.process.is_dead and not sender.is_dead:
            await life.process.turn()
            self._take(sender, life, message)

    def _take(self, sender: Process, life: Life, message: Message) -> None:
        if life.process.is_dead or sender.is_dead:
            return
        if isinstance(message, Beat) and life.cluster is not None:
            life.cluster.watchdog.heard(message.name, message.incarnation, message.overdue_s, self.now_s)
        elif isinstance(message, Stop):
            self.kill(life)

    # ------------------------------------------------------------ what must not be

    def _check_write(self, process: Process, puts: Sequence[Put]) -> None:
        """Fencing: whoever publishes leads at that moment."""
        for put in puts:
            if "/pipelines/" not in put.key:
                continue
            leader = self.etcd.keys.get(f"/dejavu/{CLUSTER}/leader")
            name = "" if leader is None else msgspec.json.decode(leader.value)["endpoint"]
            if name != f"tcp://h:{process.pid}":
                self.violations.append(f"{process.name} published {put.key}, but {name or 'nobody'} leads")
            record = msgspec.json.decode(put.value, type=PipelineRecord)
            self.published.append((self.now_s, record))

    def _check_judgement(self, kind: str, service: str, details: Mapping[str, Any]) -> None:
        """Whoever is suspected or taken for dead has suffered something, or is dead."""
        if kind not in ("suspected", "detected"):
            return
        since_s = self.now_s - self.by_pid[details["pid"]].ails_until_s
        if since_s > (AFTERMATH_S if kind == "suspected" else FORGOTTEN_S):
            reason = details.get("reason", "its key vanished")
            self.violations.append(f"{kind} {service} ({reason}) {since_s:.1f} s after something ailed it")

    def unfinished(self) -> list[str]:
        """What still has to happen before all is well again."""
        todo = [f"{name} is dead" for name, life in self.lives.items() if life.process.is_dead]
        present = {life.process.incarnation for life in self.lives.values()}
        clusters = [life.cluster for life in self.lives.values() if life.cluster is not None]
        for cluster in clusters:
            told = {member.incarnation for member in cluster.members.values()}
            if told != present:
                todo.append(f"{cluster._name} knows {sorted(told)}, not {sorted(present)}")
            for pipeline in ("token-0", "prompt-0"):
                record = cluster.records.get(pipeline)
                if cluster.is_leader and pipeline in cluster._broken:
                    todo.append(f"{pipeline} has lost a stage and was not published again")
                if record is None or not present.issuperset(stage.incarnation for stage in record.stages):
                    todo.append(f"{cluster._name}: {pipeline} is {record}")
        if len([cluster for cluster in clusters if cluster.is_leader]) != 1:
            todo.append(f"leaders: {[cluster._name for cluster in clusters if cluster.is_leader]}")
        if len({(c.leader, *sorted((n, r.epoch) for n, r in c.records.items())) for c in clusters}) > 1:
            todo.append("routers disagree")
        return todo
