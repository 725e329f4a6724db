"""What stage 0 does beside its steps: it drives its pipeline, one epoch with one driver."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from common.membership import MemberRecord, PipelineRecord
from common.messages import StageInboxMessage, StageReady, Step, StepDone
from common.stage.role import Sender
from common.stage.trips import Trips

if TYPE_CHECKING:
    from common.stage.service import StageService


class Driver(abc.ABC):
    """There is one from when all stages of `record` are `ready` until its stage is to do anything of another epoch. The
    stage tells it what it hears, on the event loop, and each time has it `pump` then."""

    def __init__(self, stage: StageService, record: PipelineRecord, ready: list[StageReady]) -> None:
        self.stage = stage
        self.record = record
        self.epoch = record.epoch
        self.capacity_tokens = min(each.num_sequence_blocks for each in ready) * stage.options.block_size
        self._trips = Trips()
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

    @abc.abstractmethod
    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        """Any message that the stage does not take itself."""

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """Its part of the figures for `status`."""

    def costs(self) -> Mapping[str, int]:
        """What this driver has counted; `status` has the sum over all epochs."""
        return {}

    def member_joined(self, record: MemberRecord) -> None:  # noqa: B027
        """As of `StageRole`, after it."""

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
        members = self.stage.members
        is_whole = all(
            stage.name in members and members[stage.name].incarnation == stage.incarnation
            for stage in self.record.stages
        )
        return overdue_s if is_whole else 0.0

    def later(self, delay_s: float, work: Callable[..., None], *arguments: object) -> None:
        """Calls `work` after a while, and `pump`, if the epoch is not over by then."""
        self.stage.process.loop.call_later(delay_s, self._unless_over, work, *arguments)

    def _unless_over(self, work: Callable[..., None], *arguments: object) -> None:
        if not self._is_over:
            work(*arguments)
            self.pump()
