"""How the KV of a simulated stage comes and goes: what is written to it, what it writes to others, and what it copies
out of a store. Each piece of it waits in the world until it is let happen."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.handoff_messages import FencedOff, FenceOff
from common.kv.arrival import Arrival
from common.kv.errors import LinkError, LinkLost
from common.kv.fence import Fence
from common.kv.lane import HandoffSpan
from common.kv.layout import PoolLayout
from common.kv.offer import GrantOffer
from common.membership import MemberRecord
from common.replica_messages import Pull, Pulled
from common.stage.repeats import Answers
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, slots

if TYPE_CHECKING:
    from tests.unit.fleet_stages import FleetPromptStage, FleetTokenStage, Stage

NUM_BLOCKS = {"token_stage": 40, "prompt_stage": 40}
"""of the first stages; others have more"""
U64 = (1 << 64) - 1


def checksum(values: Iterable[int]) -> int:
    return zlib.crc32(b"".join((value & U64).to_bytes(8, "little") for value in values))


class FleetDoor:
    """The way into a token stage's pool."""

    def __init__(self, stage: FleetTokenStage) -> None:
        layout = PoolLayout(*stage.options.layers, stage.num_blocks, BLOCK_SIZE, 1, 1, "float32", "m")
        self.offer = GrantOffer(stage.options.name, stage.incarnation, layout, "h", "tcp://h:1", b"").encode()
        self.fence = Fence()
        self._index = stage.options.stage_index

    async def begin_epoch(self, pipeline: str, epoch: int) -> None:
        self.fence.raise_to({pipeline: epoch})

    async def fence_off(self, fence: FenceOff, tell: Callable[[FencedOff], None]) -> None:
        self.fence.raise_to(fence.oldest)
        tell(FencedOff(fence.epoch, self._index, fence.oldest))

    async def writer_lost(self, writer: MemberRecord) -> None:
        self.fence.raise_to({writer.incarnation: 1})


class FleetPulls:
    """Of one stage: each happens when the world lets it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.waiting: deque[Pull] = deque()
        self.received_bytes = 0
        self._answers = Answers[Pulled]()

    def start(self, pull: Pull) -> None:
        if self._answers.begin((pull.epoch, pull.number)):
            self.waiting.append(pull)
        elif (answer := self._answers.of((pull.epoch, pull.number))) is not None:
            self._stage.tell_driver(answer)

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
            places = slots(pull.blocks, 0, pull.num_tokens, BLOCK_SIZE)
            found: list[int] = []
            for layer, pool in self._stage.pool_of_kv.items():
                values = [store.pool[layer].get(source, 0) for source in sources]
                found.append(checksum(values))
                pool.update(zip(places, values, strict=True))
            is_intact = found == pull.checksums
        self._stage.world.num_restored += is_intact
        index = self._stage.options.stage_index
        answer = Pulled(pull.epoch, pull.sequence_id, pull.attempt, is_intact, index, pull.number)
        self._answers.give((pull.epoch, pull.number), answer)
        self._stage.tell_driver(answer)


@dataclass(frozen=True)
class _Lane:
    """The way into the pool of a token pipeline's stage."""

    index: int
    stage: FleetTokenStage | None
    layers: range
    authority: dict[str, int]


class FleetWriter:
    """A prompt stage's links into pools: what is submitted, a layer at a time, is written later, in order for each
    stage that it goes to, if nobody has fenced it off."""

    def __init__(self, stage: FleetPromptStage) -> None:
        self.stage = stage
        self.pending: deque[tuple[HandoffSpan, int]] = deque()
        self._lanes: dict[str, list[_Lane]] = {}
        self._over: set[str] = set()
        self._failed: dict[tuple[str, int], LinkError] = {}
        self._draining: dict[tuple[str, int], Future[LinkError | None]] = {}
        self.sent_bytes = 0

    async def attach(self, destination: str, offers: list[GrantOffer], authority: Any = None) -> None:
        self._lanes.pop(destination, None)
        stages = [self.stage.world.token_stage(offer.incarnation) for offer in offers]
        if offers:
            self._lanes[destination] = [
                _Lane(index, stage, range(*offer.layout.layers), dict(authority))
                for index, (stage, offer) in enumerate(zip(stages, offers, strict=True))
            ]
        else:
            self._over.add(destination)
            self._drop(lambda span: span.destination == destination)

    async def reset(self, authority: dict[str, int]) -> None:
        self._drop(lambda span: True)
        for destination, lanes in self._lanes.items():
            self._lanes[destination] = [
                _Lane(lane.index, lane.stage, lane.layers, lane.authority | authority) for lane in lanes
            ]

    async def connect(self, *way: object) -> None:
        pass

    def links(self, destination: str) -> list[str]:
        return []

    def submit(self, span: HandoffSpan, local_layer: int) -> None:
        self.pending.append((span, self.stage.options.layers[0] + local_layer))

    def drain(self, sequence_id: str, attempt: int) -> Future[LinkError | None]:
        future = self._draining[sequence_id, attempt] = Future()
        self._settle()
        return future

    def ready(self) -> list[tuple[HandoffSpan, int]]:
        """The oldest for each stage of the pipeline that is next: what is for one that we have not heard of waits."""
        found: dict[int, tuple[HandoffSpan, int]] = {}
        destination = None
        for span, layer in self.pending:
            lane = self._lane(span.destination, layer)
            is_known = lane is not None or span.destination in self._over
            if is_known and destination in (None, span.destination):
                destination = span.destination
                found.setdefault(-1 if lane is None else lane.index, (span, layer))
        return list(found.values())

    def write(self, span: HandoffSpan, first: int) -> None:
        """What there is of it for one stage lands, where it still may."""
        lane = self._lane(span.destination, first)
        layers = [each for of, each in self.pending if of is span and self._lane(span.destination, each) is lane]
        self.pending = deque(job for job in self.pending if job[0] is not span or job[1] not in layers)
        stage = None if lane is None else lane.stage
        if lane is None or stage is None or not self._is_open(stage, lane):
            self._failed[span.sequence_id, span.attempt] = LinkLost("simulated")
        else:
            self._land(stage, lane.index, span, (layers[0], layers[-1] + 1))
        self._settle()

    def _is_open(self, stage: FleetTokenStage, lane: _Lane) -> bool:
        return self.stage.world.is_alive(stage) and not stage.door.fence.stops(lane.authority)

    def _lane(self, destination: str, layer: int) -> _Lane | None:
        return next((lane for lane in self._lanes.get(destination, ()) if layer in lane.layers), None)

    def _land(self, stage: FleetTokenStage, index: int, span: HandoffSpan, layers: tuple[int, int]) -> None:
        start, end = span.token_range
        ours, theirs = list(span.source_blocks), list(span.destination_blocks)
        self.stage.world.check_write(stage, span)
        places, written = slots(ours, start, end, BLOCK_SIZE), list[int]()
        for layer in range(*layers):
            values = [self.stage.pool_of_kv[layer][place] for place in places]
            stage.pool_of_kv[layer].update(zip(slots(theirs, start, end, BLOCK_SIZE), values, strict=True))
            written += values
        self.stage._handoffs._on_arrival(
            Arrival(
                span.destination, index, span.sequence_id, span.attempt, layers, start, end - start, theirs,
                span.token_hash, checksum(written),
            )
        )  # fmt: skip

    def _drop(self, is_void: Callable[[HandoffSpan], bool]) -> None:
        for span, _ in self.pending:
            if is_void(span):
                self._failed[span.sequence_id, span.attempt] = LinkLost("simulated")
        self.pending = deque((span, layer) for span, layer in self.pending if not is_void(span))
        self._settle()

    def _settle(self) -> None:
        busy = {(span.sequence_id, span.attempt) for span, _ in self.pending}
        for key in [key for key in self._draining if key not in busy]:
            self._draining.pop(key).set_result(self._failed.pop(key, None))
