"""What a prompt stage or a token stage adds to what every stage does."""

from __future__ import annotations

import abc
from typing import NamedTuple

from common.membership import MemberRecord, PipelineRecord
from common.messages import StageInboxMessage


class Sender(NamedTuple):
    """Whom a message came from."""

    name: str
    incarnation: str


class StageRole(abc.ABC):
    """Called by `StageService`, always on the event loop."""

    @abc.abstractmethod
    def handle(self, sender: Sender, message: StageInboxMessage) -> bool:
        """Any message that is not about steps, stages and replicas. False: it is the driver's, if there is one."""

    async def member_lost(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is gone."""

    async def quiesce(self) -> None:  # noqa: B027
        """Returns when nothing that this process has begun outside of its steps reads or writes any pool any more; no
        replica is copied any more."""

    async def leave(self, record: PipelineRecord) -> None:
        """Our pipeline is over as of `record`, and nothing is scheduled any more. Returns when this process touches
        nobody's pool and nobody touches its own, so that it can be given up."""
        await self.quiesce()

    async def open_pool(self) -> dict[str, str]:
        """As of `StageService.open`."""
        return {}

    async def close_pool(self) -> None:  # noqa: B027 - a role may have nothing to add
        """As of `StageService.close`."""

    async def pipeline_published(self, record: PipelineRecord) -> None:  # noqa: B027
        """Any pipeline got a new record."""
