"""Stages as they are served, each the only one of its pipeline: what they decide and say to others is the real thing,
their pools hold made-up KV, and whatever takes time waits in the world until it is let happen."""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

from common.handoff_messages import FencedOff, FenceOff, KvArrived, KvConfirmed
from common.kv.arrival import Arrival
from common.kv.errors import LinkError, LinkLost
from common.kv.fence import Fence
from common.kv.lane import HandoffSpan
from common.kv.layout import PoolLayout
from common.kv.offer import GrantOffer
from common.membership import MemberRecord, PipelineRecord, SnapshotEnd
from common.messages import Drawn, Message, StageReady, Step
from common.model.spec import load_spec
from common.replica_messages import Pull, Pulled
from common.stage.options import StageOptions
from common.stage.service import StageService
from common.stage.worker import StageSequence, StepOutput
from services.prompt_stage.driver import PromptDriver
from services.prompt_stage.handoffs import Handoffs
from services.prompt_stage.service import PromptStage
from services.token_stage.driver import ORPHAN_S, TokenDriver
from services.token_stage.sequence import Action, Produce
from services.token_stage.service import TokenStage
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, kv_of, next_token, slots
from tests.unit.simulated_peers import KnownPeers

if TYPE_CHECKING:
    from tests.unit.fleet_world import Fleet

SPEC = dataclasses.replace(load_spec("models/tiny"), num_layers=1, eos_token_ids=())
NUM_BLOCKS = {"token_stage": 40, "prompt_stage": 40}
CHUNK_TOKENS = 16
U64 = (1 << 64) - 1


def checksum(values: Iterable[int]) -> int:
    return zlib.crc32(b"".join((value & U64).to_bytes(8, "little") for value in values))


def drive(work: Coroutine[Any, Any, Any]) -> None:
    """Runs what waits for nobody here."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError(f"{work} waits")


class FleetPeers(KnownPeers):
    """Connections to incarnations: what is sent to one that is gone arrives nowhere."""

    def __init__(self, world: Fleet, incarnation: str) -> None:
        super().__init__(incarnation)
        self._world = world

    def send(self, name: str, message: Message, payload: object = None) -> bool:
        if name not in self._known:
            return False
        to = self._known[name].removeprefix("tcp://").removesuffix(":1")
        self._world.send(self._identity, to, message)
        return True


class _Loop:
    """What is to happen much later."""

    def __init__(self, world: Fleet) -> None:
        self.later: list[Callable[[], object]] = []
        self.time = lambda: world.now_s

    def call_later(self, delay_s: float, happen: Callable[..., object], *arguments: object) -> None:
        if delay_s >= ORPHAN_S:  # the world has drivers remind others
            self.later.append(lambda: happen(*arguments))

    def call_soon_threadsafe(self, happen: Callable[..., object], *arguments: object) -> None:
        happen(*arguments)


class _Process:
    """Around a stage: nothing takes time, and it ends when the world says so."""

    def __init__(self, world: Fleet) -> None:
        self.loop = _Loop(world)
        self.over: Future[PipelineRecord] = Future()

    in_background = staticmethod(drive)
    stop = crash = staticmethod(lambda *error: None)


class _Engine:
    """Its steps fly until the world lets one happen."""

    worker = None

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def run(self, step: Step, hidden: memoryview | None, on_output: object) -> None:
        self._stage.flying.append(step)

    async def idle(self) -> None:
        self._stage.flying.clear()

    def ready(self, epoch: int) -> StageReady:
        return StageReady(epoch, 0, NUM_BLOCKS[self._stage.options.role])


class _Pulls:
    """Of one stage: each happens when the world lets it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.waiting: deque[Pull] = deque()
        self.received_bytes = 0

    def start(self, pull: Pull) -> None:
        self.waiting.append(pull)

    async def idle(self) -> None:
        self.waiting.clear()

    async def store_joined(self, record: MemberRecord) -> None:
        pass

    async def store_lost(self, name: str) -> None:
        pass

    def happen(self) -> None:
        pull = self.waiting.popleft()
        store = self._stage.world.store_named(pull.store)
        is_intact = store is not None
        if store is not None:
            sources = slots(pull.store_blocks, 0, pull.num_tokens, STORE_BLOCK_SIZE)
            values = [store.pool.get(place, 0) for place in sources]
            is_intact = [checksum(values)] == pull.checksums
            self._stage.pool_of_kv.update(zip(slots(pull.blocks, 0, pull.num_tokens, BLOCK_SIZE), values, strict=True))
        self._stage.world.num_restored += is_intact
        self._stage.tell_driver(Pulled(pull.epoch, pull.sequence_id, pull.attempt, is_intact))


class Stage(StageService):
    """A stage in this world, whatever its role."""

    world: Fleet
    pool_of_kv: dict[int, int]
    flying: deque[Step]
    table: dict[str, StageSequence]
    pulls: _Pulls

    def __init__(self, world: Fleet, options: StageOptions, incarnation: str) -> None:
        super().__init__(options, SPEC, incarnation, cast(Any, _Process(world)))
        service: Any = self
        service.engine = _Engine(self)
        self.world = world
        self.process.over.add_done_callback(lambda over: world.leaving.append(self))
        self.pool_of_kv = {}
        self.pulls = service._pulls = _Pulls(self)
        self.peers = FleetPeers(world, f"{options.name}.{incarnation}")
        self._knows_members = False
        self.new_worker()

    def new_worker(self) -> Any:
        self.flying, self.table = deque(), {}

    def arrive(self, peer: str, frame: bytes) -> None:
        self.receive(peer.encode(), [memoryview(frame)])

    def hear(self, kind: str, event: Any) -> None:
        if isinstance(event, SnapshotEnd):
            self._knows_members = True
        else:
            drive(self.hear_of_member(event) if kind == "members" else self.hear_of_pipeline(event))

    def can_hear(self, kind: str) -> bool:
        return kind == "members" or self._knows_members

    def ways(self) -> list[Callable[[], None]]:
        """What can happen inside it."""
        found: list[Callable[[], None]] = []
        if self.flying:
            found.append(self.run_step)
        if self.pulls.waiting:
            found.append(self.pulls.happen)
        return found

    def run_step(self) -> None:
        """Everything that it reads is there, and is what it should be."""
        step = self.flying.popleft()
        for opened in step.closes:
            self.closed(self.table.pop(opened))
        for each in step.opens:
            tokens = list(memoryview(each.token_ids).cast("i"))
            self.table[each.sequence_id] = StageSequence(each, tokens, list(each.blocks))
        drawn: list[Drawn] = []
        for chunk in step.chunks:
            sequence = self.table[chunk.sequence_id]
            tokens = sequence.tokens
            sequence.blocks += chunk.new_blocks
            if chunk.appended is not None and chunk.start == len(tokens):
                tokens.append(chunk.appended)
            start, end = chunk.start, chunk.start + chunk.num_tokens
            places, values = slots(sequence.blocks, 0, end, BLOCK_SIZE), kv_of(tokens, end)
            assert [self.pool_of_kv[place] for place in places[:start]] == values[:start], "KV diverges"
            self.pool_of_kv.update(zip(places[start:], values[start:], strict=True))
            if chunk.draws:
                drawn.append(Drawn(next_token(tokens)))
        self.computed(step)
        self._on_output(step, StepOutput(None, drawn))

    def closed(self, sequence: StageSequence) -> None:
        pass

    def computed(self, step: Step) -> None:
        pass


class _Door:
    """The way into a token stage's pool."""

    def __init__(self, stage: FleetTokenStage) -> None:
        layout = PoolLayout(0, 1, NUM_BLOCKS["token_stage"], BLOCK_SIZE, 1, 1, "float32", "m")
        self.offer = GrantOffer(stage.options.name, stage.incarnation, layout, "h", "tcp://h:1", b"").encode()
        self.fence = Fence()

    async def begin_epoch(self, pipeline: str, epoch: int) -> None:
        self.fence.raise_to({pipeline: epoch})

    async def fence_off(self, fence: FenceOff, tell: Callable[[FencedOff], None]) -> None:
        self.fence.raise_to(fence.oldest)
        tell(FencedOff(fence.epoch, 0, fence.oldest))

    async def writer_lost(self, writer: MemberRecord) -> None:
        self.fence.raise_to({writer.incarnation: 1})


class FleetTokenDriver(TokenDriver):
    """Shows nothing that is not safe."""

    stage: FleetTokenStage

    def _carry_out(self, actions: Iterable[Action]) -> None:
        actions = list(actions)
        if self.stage.incarnation in self.stage.world.processes:
            for action in actions:
                if isinstance(action, Produce) and action.finish_reason is None:
                    self.stage.world.check_safe(self.stage, self.scheduler, action)
        super()._carry_out(actions)


class FleetTokenStage(Stage, TokenStage):
    """`arrivals` are hand-offs that have not been verified yet."""

    driver: FleetTokenDriver | None

    def __init__(self, world: Fleet, options: StageOptions, incarnation: str) -> None:
        super().__init__(world, options, incarnation)
        service: Any = self
        self.door = service._door = _Door(self)
        self.timers = service.process.loop
        self.arrivals: deque[KvArrived] = deque()
        service._arrivals = self

    def new_driver(self, record: PipelineRecord, ready: list[StageReady]) -> TokenDriver:
        return FleetTokenDriver(self, record, ready, self._prompts)

    def verify(self, arrived: KvArrived) -> None:
        self.arrivals.append(arrived)

    def ways(self) -> list[Callable[[], None]]:
        return super().ways() + [self.verified] * bool(self.arrivals)

    def verified(self) -> None:
        a = self.arrivals.popleft()
        places = slots(list(a.blocks), a.start, a.start + a.num_tokens, BLOCK_SIZE)
        is_intact = checksum(self.pool_of_kv.get(place, 0) for place in places) == a.checksum
        confirmed = KvConfirmed(a.epoch, a.sequence_id, a.attempt, a.layers, a.start, a.num_tokens, is_intact)
        if a.epoch == self.epoch:
            self.tell_driver(confirmed)


class _Writer:
    """A prompt stage's links into pools: what is submitted is written later, in order, if nobody has fenced it off."""

    def __init__(self, stage: FleetPromptStage) -> None:
        self.stage = stage
        self.pending: deque[HandoffSpan] = deque()
        self._links: dict[str, tuple[FleetTokenStage | None, dict[str, int]]] = {}
        self._over: set[str] = set()
        self._failed: dict[tuple[str, int], LinkError] = {}
        self._draining: dict[tuple[str, int], Future[LinkError | None]] = {}
        self.sent_bytes = 0

    async def attach(self, destination: str, offers: list[GrantOffer], authority: Any = None) -> None:
        self._links.pop(destination, None)
        if offers:
            self._links[destination] = (self.stage.world.token_stage(offers[0].incarnation), dict(authority))
        else:
            self._over.add(destination)
            self._drop(lambda span: span.destination == destination)

    async def reset(self, authority: object) -> None:
        self._drop(lambda span: True)
        self._links = {name: (stage, dict(known) | dict(authority)) for name, (stage, known) in self._links.items()}  # type: ignore[call-overload]

    async def connect(self, *way: object) -> None:
        pass

    def links(self, destination: str) -> list[str]:
        return []

    def submit(self, span: HandoffSpan, layer: int) -> None:
        self.pending.append(span)

    def drain(self, sequence_id: str, attempt: int) -> Future[LinkError | None]:
        future = self._draining[sequence_id, attempt] = Future()
        self._settle()
        return future

    def ready(self) -> HandoffSpan | None:
        """The oldest that can go: what is for a pipeline that we have not heard of yet waits."""
        known = (span for span in self.pending if span.destination in self._links or span.destination in self._over)
        return next(known, None)

    def write(self) -> None:
        """The oldest of them lands, where it still may."""
        span = self.ready()
        assert span is not None
        self.pending.remove(span)
        stage, authority = self._links.get(span.destination, (None, {}))
        if stage is None or not self.stage.world.is_alive(stage) or stage.door.fence.stops(authority):
            self._failed[span.sequence_id, span.attempt] = LinkLost("simulated")
        else:
            self._land(stage, span)
        self._settle()

    def _land(self, stage: FleetTokenStage, span: HandoffSpan) -> None:
        start, end = span.token_range
        ours, theirs = list(span.source_blocks), list(span.destination_blocks)
        self.stage.world.check_write(stage, span)
        values = [self.stage.pool_of_kv[place] for place in slots(ours, start, end, BLOCK_SIZE)]
        stage.pool_of_kv.update(zip(slots(theirs, start, end, BLOCK_SIZE), values, strict=True))
        self.stage._handoffs._on_arrival(
            Arrival(
                span.destination, 0, span.sequence_id, span.attempt, (0, 1), start, end - start, theirs,
                span.token_hash, checksum(values),
            )
        )  # fmt: skip

    def _drop(self, is_void: Callable[[HandoffSpan], bool]) -> None:
        for span in self.pending:
            if is_void(span):
                self._failed[span.sequence_id, span.attempt] = LinkLost("simulated")
        self.pending = deque(span for span in self.pending if not is_void(span))
        self._settle()

    def _settle(self) -> None:
        busy = {(span.sequence_id, span.attempt) for span in self.pending}
        for key in [key for key in self._draining if key not in busy]:
            self._draining.pop(key).set_result(self._failed.pop(key, None))


class FleetPromptStage(Stage, PromptStage):
    """A prompt pipeline."""

    driver: PromptDriver | None

    def __init__(self, world: Fleet, options: StageOptions, incarnation: str) -> None:
        super().__init__(world, options, incarnation)
        self._handoffs = Handoffs(options.pipeline, incarnation, 0, 1, "zmq", self.peers.send)
        self.writer = _Writer(self)
        self._handoffs._writer = self.writer  # type: ignore[assignment]

    def ways(self) -> list[Callable[[], None]]:
        return super().ways() + [self.writer.write] * (self.writer.ready() is not None)

    def computed(self, step: Step) -> None:
        self._handoffs.submit(self._handoffs.spans(step, self.table), 0)

    def closed(self, sequence: StageSequence) -> None:
        epoch, opened = self.epoch, sequence.opened
        self._handoffs.drain(opened).add_done_callback(lambda done: self._drained(epoch, opened, done))


def stage_options(name: str, pipeline: str, role: str) -> StageOptions:
    return StageOptions(
        name=name, role=role, etcd="", cluster="c", host="h", model="", dtype="", pipeline=pipeline,
        other_pipeline=f"{'prompt' if role == 'token_stage' else 'token'}-of-{pipeline}", stage_index=0, num_stages=1,
        layers=(0, 1), device="cpu", kv_memory_bytes=0, host_kv_memory_bytes=0, swap="off", block_size=BLOCK_SIZE,
        chunk_tokens=CHUNK_TOKENS, num_threads=1, cores="", link="zmq", is_colocated=False, is_standby=False,
        num_replicas=1, recovery="auto", durability="async",
    )  # fmt: skip
