"""What stage 0 does beside its steps: it drives its pipeline, one epoch with one driver."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from common.kv.checksum import hash_tokens
from common.kv.token_ids import ID_BYTES
from common.membership import MemberRecord, PipelineRecord
from common.messages import StageInboxMessage, StageReady, Step, StepDone
from common.model.spec import ModelSpec
from common.peers import Peers
from common.replica_messages import HeldReplica, Pull, Pulled
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.repeats import PullRequests
from common.stage.role import Sender
from common.stage.trips import Trips


class OwnStage(Protocol):
    """What a driver has of the stage that it is part of."""

    options: StageOptions
    spec: ModelSpec
    process: StageProcess
    peers: Peers
    members: dict[str, MemberRecord]
    records: dict[str, PipelineRecord]

    def routers(self) -> list[str]: ...

    def accepts(self, epoch: int) -> bool: ...

    def tell_stage(self, name: str, message: StageInboxMessage) -> None: ...

    def run(self, step: Step) -> None: ...


class Driver(abc.ABC):
    """There is one from when all stages of `record` are `ready` until its stage is to do anything of another epoch. The
    stage tells it what it hears, on the event loop, and each time has it `pump` then."""

    min_trip_limit_s = 20.0
    """No step that has taken less is lost: a prompt stage may wait so long for token stages that do not answer."""

    def __init__(self, stage: OwnStage, record: PipelineRecord, ready: list[StageReady]) -> None:
        self.stage = stage
        self.record = record
        self.epoch = record.epoch
        self.capacity_tokens = min(each.num_sequence_blocks for each in ready) * stage.options.block_size
        self._trips = Trips(self.min_trip_limit_s)
        self._pull_requests = PullRequests(record)
        self._is_over = False

    def begin(self) -> None:  # noqa: B027 - there may be nothing to do
        """Called once, when the stage has this driver and before anybody hears that the pipeline is ready."""

    def end(self) -> None:
        """The epoch is over."""
        self._is_over = True

    @abc.abstractmethod
    def next_step(self) -> Step | None:
        """What to run next; None: nothing now."""

    @abc.abstractmethod
    def step_done(self, done: StepDone) -> None:
        """What follows from a step that came out of the last stage."""

    def hear(self, sender: Sender, message: StageInboxMessage) -> None:
        """Any message that the stage does not take itself."""
        # a stage that was asked to copy twice has answered twice
        if not isinstance(message, Pulled) or self._is_news(message):
            self.handle(sender, message)

    def _is_news(self, pulled: Pulled) -> bool:
        # pulls of another epoch had the same numbers
        return self.stage.accepts(pulled.epoch) and self._pull_requests.answered(pulled)

    @abc.abstractmethod
    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        """As of `hear`; of all that a stage answers to a pull, once."""

    def remind(self) -> None:
        """Every `REPEAT_S`: whoever has not answered is asked again."""
        self._tell_stages(self._pull_requests.unanswered())

    def pull(
        self, sequence_id: str, attempt: int, store: str, held: HeldReplica, blocks: list[int], token_ids: bytes
    ) -> None:
        """Has every stage copy its layers of what a store holds of a sequence into `blocks`. `token_ids` are all of the
        sequence's (packed), or at least those that the store has."""
        token_hash = hash_tokens(token_ids[: ID_BYTES * held.num_tokens])
        wanted = Pull(
            self.epoch, sequence_id, attempt, store, held.num_tokens, held.blocks, blocks, token_hash, held.checksums
        )
        self._tell_stages(self._pull_requests.ask(wanted))

    def _tell_stages(self, messages: Iterable[tuple[str, StageInboxMessage]]) -> None:
        for name, message in messages:
            self.stage.tell_stage(name, message)

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """Its part of the figures for `status`."""

    def costs(self) -> Mapping[str, int]:
        """What this driver has counted; `status` has the sum over all epochs."""
        return {}

    def member_joined(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is there, and connected."""

    def member_lost(self, record: MemberRecord) -> None:  # noqa: B027
        """As of `StageRole`, before it."""

    def pipeline_published(self, record: PipelineRecord) -> None:  # noqa: B027
        """As of `StageRole`, after it."""

    def pump(self) -> None:
        """Starts every step that may start now."""
        while (step := self.next_step()) is not None:
            self._trips.started(step.step, sum(chunk.num_tokens for chunk in step.chunks), time.monotonic())
            self.stage.run(step)

    def came_out(self, done: StepDone) -> None:
        """A step came out of the last stage."""
        self._trips.done(done.step, time.monotonic())
        self.step_done(done)
        self.pump()

    def overdue_s(self, now_s: float) -> float:
        """By how much a step is late though all stages are there; 0: none is."""
        overdue_s = self._trips.overdue_s(now_s)
        return overdue_s if self.is_whole else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all stages are there, as far as we have heard."""
        members = self.stage.members
        return all(
            stage.name in members and members[stage.name].incarnation == stage.incarnation
            for stage in self.record.stages
        )

    def later(self, delay_s: float, work: Callable[..., None], *arguments: object) -> None:
        """Calls `work` after a while, and `pump`, if the epoch is not over by then."""
        self.stage.process.loop.call_later(delay_s, self._unless_over, work, *arguments)

    def _unless_over(self, work: Callable[..., None], *arguments: object) -> None:
        if not self._is_over:
            work(*arguments)
            self.pump()
