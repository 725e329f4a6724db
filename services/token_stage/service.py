"""A token stage: what arrives in its pool is verified, replicas are copied into it, and writers are kept out of it."""

from __future__ import annotations

from typing import Any

from common.handoff_messages import FencedOff, FenceOff, KvArrived
from common.kv.server import PoolServer
from common.membership import MemberRecord, PipelineRecord
from common.messages import PipelineReady, StageInboxMessage, StageReady
from common.model.spec import ModelSpec
from common.replica_messages import Claim, Claimed
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.role import Sender
from common.stage.service import StageService
from services.token_stage.arrivals import Arrivals
from services.token_stage.door import Door
from services.token_stage.driver import TokenDriver
from services.token_stage.guests import Guests
from services.token_stage.prompt_pipelines import PromptPipelines


class TokenStage(StageService):
    """Layers [a, b) of a token pipeline, with the pool that prompt stages write into."""

    def __init__(self, options: StageOptions, spec: ModelSpec, incarnation: str, process: StageProcess) -> None:
        super().__init__(options, spec, incarnation, process)
        self._prompts = PromptPipelines()
        self._guests = Guests()
        self._door: Door
        self._arrivals: Arrivals

    def new_driver(self, record: PipelineRecord, ready: list[StageReady]) -> TokenDriver:
        return TokenDriver(self, record, ready, self._prompts)

    async def open_pool(self) -> dict[str, str]:
        pool = self.engine.tiers.pool
        server = await PoolServer.start(pool, self.options.host, self.incarnation)
        self._door = Door(server, self.options.stage_index, self.process.stop)
        self._arrivals = Arrivals(pool, self.beside, self.tell_driver)
        return {"kv_offer": self._door.offer}

    async def close_pool(self) -> None:
        await self._door.aclose()

    def handle(self, sender: Sender, message: StageInboxMessage) -> bool:
        match message:
            case KvArrived():
                if self.accepts(message.epoch):
                    self._arrivals.verify(message)
            case FenceOff():
                if self.accepts(message.epoch):
                    self.process.in_background(self._door.fence_off(message, self._fenced_off))
            case Claimed(name, _, epoch) if self.driver is None:
                if epoch == self.epoch:  # whoever leaves its pipeline has no place in it any more
                    self._guests.left(name)
            case PipelineReady():
                self._prompts.reported(message)
                return False
            case _:
                return False
        return True

    def _fenced_off(self, fenced: FencedOff) -> None:
        if fenced.epoch == self.epoch:
            self.tell_driver(fenced)

    async def quiesce(self) -> None:
        fenced = self._door.begin_epoch(self.options.pipeline, self.epoch)
        if self.record is None:
            self.process.in_background(fenced)  # nobody waits for a spare
        else:
            await fenced

    async def leave(self, record: PipelineRecord) -> None:
        await self._door.begin_epoch(record.pipeline, record.epoch)
        stores = [member.name for member in self.members.values() if member.role == "cache_store"]
        claim = Claim(record.pipeline, record.epoch)
        await self._guests.gone(stores, lambda name: self.peers.send(name, claim))

    async def member_lost(self, record: MemberRecord) -> None:
        if record.role == "cache_store":
            self._guests.left(record.name)
        elif record.role == "prompt_stage":
            self.process.in_background(self._door.writer_lost(record))

    async def pipeline_published(self, record: PipelineRecord) -> None:
        if record.role == "prompt_stage" and record.successor is not None:
            self._prompts.over(record.pipeline)

    def stats(self) -> dict[str, Any]:
        stats = super().stats() | {"handoff": self._arrivals.stats(), **self._door.stats()}
        if self.driver is not None:
            stats["replication"]["pulled_bytes"] = self._pulls.received_bytes
        return stats
