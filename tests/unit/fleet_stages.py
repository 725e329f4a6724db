"""Stages as they are served: what they decide and say to others is the real thing, their pools hold made-up KV, and
whatever takes time waits in the world until it is let happen."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from common.handoff_messages import KvArrived, KvConfirmed
from common.membership import PipelineRecord, SnapshotEnd
from common.messages import Drawn, Message, StageReady, Step
from common.model.spec import load_spec
from common.stage.options import StageOptions
from common.stage.service import StageService
from common.stage.worker import StageSequence, StepOutput
from services.prompt_stage.driver import PromptDriver
from services.prompt_stage.handoffs import Handoffs
from services.prompt_stage.service import PromptStage
from services.token_stage.driver import ORPHAN_S, TokenDriver
from services.token_stage.sequence import Action, Produce
from services.token_stage.service import TokenStage
from tests.unit.fleet_links import NUM_BLOCKS, FleetDoor, FleetPulls, FleetWriter, checksum
from tests.unit.made_up_kv import BLOCK_SIZE, kv_of, next_token, slots
from tests.unit.simulated_peers import KnownPeers

if TYPE_CHECKING:
    from tests.unit.fleet_world import Fleet

NUM_LAYERS = 3
SPEC = dataclasses.replace(load_spec("models/tiny"), num_layers=NUM_LAYERS, eos_token_ids=())
CHUNK_TOKENS = 16


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
        return StageReady(epoch, self._stage.options.stage_index, self._stage.num_blocks)


class Stage(StageService):
    """A stage in this world, whatever its role. `pool_of_kv` has what each of its layers holds, by slot."""

    world: Fleet
    pool_of_kv: dict[int, dict[int, int]]
    flying: deque[Step]
    table: dict[str, StageSequence]
    pulls: FleetPulls

    def __init__(self, world: Fleet, options: StageOptions, incarnation: str) -> None:
        super().__init__(options, SPEC, incarnation, cast(Any, _Process(world)))
        service: Any = self
        service.engine = _Engine(self)
        self.world = world
        self.process.over.add_done_callback(lambda over: world.leaving.append(self))
        self.pool_of_kv = {layer: {} for layer in range(*options.layers)}
        self.pulls = service._pulls = FleetPulls(self)
        self.peers = FleetPeers(world, f"{options.name}.{incarnation}")
        self._knows_members = False
        self.new_worker()

    @property
    def num_blocks(self) -> int:
        return NUM_BLOCKS[self.options.role] + 4 * self.options.stage_index

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
            for layer, pool in self.pool_of_kv.items():
                assert [pool[place] - layer for place in places[:start]] == values[:start], "KV diverges"
                pool.update((place, value + layer) for place, value in zip(places[start:], values[start:], strict=True))
            if chunk.draws and self.options.is_last:
                drawn.append(Drawn(next_token(tokens)))
        self.computed(step)
        self._on_output(step, StepOutput(None, drawn))

    def closed(self, sequence: StageSequence) -> None:
        pass

    def computed(self, step: Step) -> None:
        pass


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
        self.door = service._door = FleetDoor(self)
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
        found = (self.pool_of_kv[layer].get(place, 0) for layer in range(*a.layers) for place in places)
        is_intact = checksum(found) == a.checksum
        confirmed = KvConfirmed(a.epoch, a.sequence_id, a.attempt, a.layers, a.start, a.num_tokens, is_intact)
        if a.epoch == self.epoch:
            self.tell_driver(confirmed)


class FleetPromptStage(Stage, PromptStage):
    """A prompt pipeline."""

    driver: PromptDriver | None

    def __init__(self, world: Fleet, options: StageOptions, incarnation: str) -> None:
        super().__init__(world, options, incarnation)
        self._handoffs = Handoffs(
            options.pipeline, incarnation, options.stage_index, options.num_stages, "zmq", self.peers.send
        )
        self.writer = FleetWriter(self)
        self._handoffs._writer = self.writer  # type: ignore[assignment]

    def ways(self) -> list[Callable[[], None]]:
        return super().ways() + [partial(self.writer.write, *job) for job in self.writer.ready()]

    def computed(self, step: Step) -> None:
        spans = self._handoffs.spans(step, self.table)
        for local_layer in range(len(self.pool_of_kv)):
            self._handoffs.submit(spans, local_layer)

    def closed(self, sequence: StageSequence) -> None:
        epoch, opened = self.epoch, sequence.opened
        self._handoffs.drain(opened).add_done_callback(lambda done: self._drained(epoch, opened, done))


def stage_options(
    name: str, pipeline: str, role: str, index: int, cut: list[tuple[int, int]], *, is_standby: bool
) -> StageOptions:
    return StageOptions(
        name=name, role=role, etcd="", cluster="c", host="h", model="", dtype="", pipeline=pipeline,
        other_pipeline=f"{'prompt' if role == 'token_stage' else 'token'}-of-{pipeline}", stage_index=index,
        num_stages=len(cut), layers=cut[index], device="cpu", kv_memory_bytes=0, host_kv_memory_bytes=0, swap="off",
        block_size=BLOCK_SIZE, chunk_tokens=CHUNK_TOKENS, num_threads=1, cores="", link="zmq", is_colocated=False,
        is_standby=is_standby, num_replicas=1, recovery="auto", durability="async",
    )  # fmt: skip
