"""What a prompt stage or a token stage adds to the process around it."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from common import messages
from common.membership import MemberRecord, PipelineRecord
from common.messages import StageReady, Step, StepDone


class Sender(NamedTuple):
    """Whom a message came from."""

    name: str
    incarnation: str


class StageRole(abc.ABC):
    """Called by `StageService`, always on the event loop."""

    @abc.abstractmethod
    def new_driver(self, epoch: int, stages: list[StageReady]) -> None:
        """All stages run `epoch`: start scheduling over the blocks that all of them have."""

    @abc.abstractmethod
    def end_driver(self) -> None:
        """This process is no longer part of its pipeline: nothing is scheduled any more."""

    @abc.abstractmethod
    def next_step(self) -> Step | None:
        """What to run next (stage 0 only)."""

    @abc.abstractmethod
    def step_done(self, done: StepDone) -> None:
        """A step came out of the last stage (stage 0 only)."""

    @abc.abstractmethod
    def handle(self, sender: Sender, message: messages.StageInboxMessage) -> None:
        """Any message that is not about steps and stages."""

    @abc.abstractmethod
    def role_stats(self) -> dict[str, Any]:
        """Figures for `status`, at least kv_blocks."""

    async def member_joined(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is there, and connected."""

    async def member_lost(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is gone."""

    async def quiesce(self) -> None:  # noqa: B027
        """Returns when nothing that this process has begun outside of its steps reads or writes any pool any more."""

    async def leave(self, record: PipelineRecord) -> None:
        """Our pipeline is over as of `record`, and nothing is scheduled any more. Returns when this process touches
        nobody's pool and nobody touches its own, so that it can be given up."""
        await self.quiesce()

    async def open_pool(self) -> dict[str, str]:
        """Called once the pool exists; returns details to register under."""
        return {}

    async def close_pool(self) -> None:  # noqa: B027 - a role may have nothing to add
        """Called before the pool is closed."""

    async def pipeline_published(self, record: PipelineRecord) -> None:  # noqa: B027
        """Any pipeline got a new record."""
