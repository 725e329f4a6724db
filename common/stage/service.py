"""A stage in its pipeline, the same for both roles: epochs, the way of a step, and what others are told.

A stage waits until the leading router publishes its pipeline with this incarnation in it, and runs that epoch until a
newer one appears. Stage 0 drives: it forms steps, the others follow them in order.
"""

from __future__ import annotations

import abc
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from common import messages
from common.membership import MemberJoined, MemberLost, MemberRecord, PipelineRecord
from common.messages import (
    PipelineReady,
    StageInboxMessage,
    StageReady,
    StatsQuery,
    StatsReply,
    Step,
    StepDone,
    Stop,
    SwapFigures,
)
from common.model.spec import ModelSpec
from common.peers import Peers, understood
from common.replica_messages import Pull
from common.stage.driver import Driver
from common.stage.engine import Engine
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.pulls import Pulls
from common.stage.readiness import Readiness
from common.stage.role import Sender, StageRole
from common.stage.worker import StageWorker, StepOutput
from common.succession import is_retired

logger = logging.getLogger(__name__)


class StageService(StageRole):
    """One stage. Subclasses say what a prompt or a token stage does around its steps. `record` is our pipeline's in the
    epoch that we run (None: we stand by), `driver` is there while we drive it and all of its stages are ready."""

    def __init__(self, options: StageOptions, spec: ModelSpec, incarnation: str, process: StageProcess) -> None:
        self.options = options
        self.spec = spec
        self.incarnation = incarnation
        self.process = process
        self.engine = Engine(options, spec, process.loop, process.crash)
        self.peers = Peers(f"{options.name}.{incarnation}")
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        """for copies and checks that no step waits for"""
        self.members: dict[str, MemberRecord] = {}
        self.records: dict[str, PipelineRecord] = {}
        self.epoch = 0
        self.record: PipelineRecord | None = None
        self.driver: Driver | None = None
        self._pulls: Pulls
        self._readiness = Readiness(options.num_stages)
        self._ready_in = 0
        """the epoch that we have said we run"""
        self._counters = Counter(refused_frames=0, bad_frames=0)

    async def open(self) -> dict[str, str]:
        """Called once the pool exists; returns details to register under."""
        self._pulls = Pulls(self.engine.tiers.pool, self.beside, self.options.stage_index, self.tell_driver)
        return await self.open_pool()

    async def close(self) -> None:
        """Called before the pool is closed."""
        await self._pulls.aclose()
        self.beside.shutdown(wait=True, cancel_futures=True)
        await self.close_pool()

    # ------------------------------------------------------------ who else is there

    def routers(self) -> list[str]:
        return [member.name for member in self.members.values() if member.role == "router"]

    async def hear_of_member(self, event: MemberJoined | MemberLost) -> None:
        """What is to be used is made before the driver hears of it, and undone after it has: it decides upon nothing
        that is not there."""
        record = event.record
        if isinstance(event, MemberLost):
            self.members.pop(record.name, None)
            self.peers.drop(record.name, record.endpoint)
            if self.driver is not None:
                self.driver.member_lost(record)
                self.driver.pump()
            if record.role == "cache_store":
                await self._pulls.store_lost(record.name)
            await self.member_lost(record)
            return
        # connected first: whoever is among the members can be sent something
        await self.peers.connect(record.name, record.endpoint)
        self.members[record.name] = record
        self._report_ready(record)
        if record.role == "cache_store":
            await self._pulls.store_joined(record)
        if self.driver is not None:
            self.driver.member_joined(record)
            self.driver.pump()

    async def hear_of_pipeline(self, record: PipelineRecord) -> None:
        """A pipeline was published anew, perhaps ours."""
        for stage in record.stages if record.successor is None else ():
            # its members may become known to us only later
            await self.peers.connect(stage.name, stage.endpoint)
            # again, as an older publication may have led us back to an incarnation that was gone
            self._report_ready(stage)
        await self._reconnect_spares(record)
        self.records[record.pipeline] = record
        if is_retired(self.options.pipeline, self.records):
            if not self.process.over.done():
                self.process.over.set_result(self.records[self.options.pipeline])
        elif record.pipeline == self.options.pipeline and record.successor is None and record.epoch > self.epoch:
            await self._enter(record)
        await self.pipeline_published(record)
        if self.driver is not None:
            self.driver.pipeline_published(record)
            self.driver.pump()

    async def _reconnect_spares(self, record: PipelineRecord) -> None:
        """Who has a place no more is connected as the member it is: the publication before may have been late, and its
        stage of that name dead."""
        published = () if record.successor is not None else {stage.name for stage in record.stages}
        before = self.records.get(record.pipeline)
        for stage in () if before is None else before.stages:
            member = self.members.get(stage.name)
            if member is not None and stage.name not in published:
                await self.peers.connect(member.name, member.endpoint)

    # ------------------------------------------------------------ epochs

    async def _enter(self, record: PipelineRecord) -> None:
        own = record.stages[self.options.stage_index]
        if own.incarnation != self.incarnation:
            # another process has this place: whatever still arrives for us is of an epoch that is over
            if self.record is not None:
                logger.info("replaced by %s in epoch %d", own.name, record.epoch)
            self._stand_by(record.epoch)
            await self._pulls.idle()
            await self.quiesce()
            return
        self._set_epoch(record.epoch, record)
        logger.info("epoch %d of %s begins", record.epoch, record.pipeline)
        # ready means that nothing of an older epoch reads or writes any pool any more: first no step is running ...
        await self.engine.idle()
        # ... then nothing that steps, or replicas, have begun
        await self._pulls.idle()
        await self.quiesce()
        if self.epoch == record.epoch:
            self._ready_in = record.epoch
            self._report_stage_ready(record)

    def _set_epoch(self, epoch: int, record: PipelineRecord | None) -> None:
        """From now on nothing of an older one is accepted, decided or computed."""
        if self.driver is not None:
            self.driver.end()
            self._counters.update(self.driver.costs())
            self.driver = None
        self.epoch, self.record = epoch, record
        self.engine.worker = self.new_worker()

    def _stand_by(self, epoch: int) -> None:
        self._set_epoch(epoch, None)
        self._readiness.forget(epoch)

    async def end(self, record: PipelineRecord) -> None:
        """Returns when this process has nothing to do with its pipeline any more, as of its last record."""
        logger.info("%s is over: this stage goes on in %s", record.pipeline, record.successor)
        self._stand_by(record.epoch)
        await self.engine.idle()
        await self._pulls.idle()
        await self.leave(record)

    @abc.abstractmethod
    def new_driver(self, record: PipelineRecord, ready: list[StageReady]) -> Driver:
        """All stages of our pipeline run the epoch of `record`, and this one drives it."""

    def new_worker(self) -> StageWorker:
        """With an empty table, for a new epoch."""
        return self.engine.new_worker()

    # ------------------------------------------------------------ who is ready

    def _report_stage_ready(self, record: PipelineRecord) -> None:
        ready = self.engine.ready(record.epoch)
        if self.options.is_driver:
            self._stage_ready(ready)
        else:
            self.peers.send(record.stages[0].name, ready)

    def _stage_ready(self, ready: StageReady) -> None:
        self._readiness.add(ready)
        stages = self._readiness.all_of(self.epoch)
        if ready.epoch != self.epoch or stages is None or self.record is None or self.driver is not None:
            return
        self.driver = self.new_driver(self.record, stages)
        self.driver.begin()
        self.driver.pump()
        for member in self.members.values():
            self._report_ready(member)

    def remind(self) -> None:
        """Every `REPEAT_S`: what others may not have heard, as it was lost with a connection, they are told again."""
        if self.record is not None and self._ready_in == self.epoch and not self.options.is_driver:
            self._report_stage_ready(self.record)
        driver = self.driver
        if driver is None:
            return
        if driver.is_whole:
            for member in self.members.values():
                self._report_ready(member)
        driver.remind()
        driver.pump()

    def _report_ready(self, member: MemberRecord) -> None:
        """Routers place work on pipelines that are ready; token drivers send prompts to them."""
        if self.driver is None:
            return
        is_token_driver = member.role == "token_stage" and member.stage_index == 0
        if member.role == "router" or (self.options.role == "prompt_stage" and is_token_driver):
            self.peers.send(member.name, PipelineReady(self.options.pipeline, self.epoch, self.driver.capacity_tokens))

    # ------------------------------------------------------------ messages

    def receive(self, peer: bytes, frames: list[memoryview]) -> None:
        """A message from another process."""
        match message := understood(messages.decode_stage_inbox, peer, frames, self._counters):
            case None:
                pass
            case Step():
                if self.accepts(message.epoch):
                    self.run(message, frames[1] if len(frames) > 1 else None)
            case StepDone():
                if self.accepts(message.epoch):
                    self._step_done(message)
            case StageReady():
                self._stage_ready(message)
            case StatsQuery():
                self._answer_stats(message)
            case Stop():
                self.process.stop()
            case _:
                self._take(Sender(*peer.decode(errors="replace").rpartition(".")[::2]), message)

    def accepts(self, epoch: int) -> bool:
        """The fence: False, and counted, for anything that is not of the current epoch, or of an epoch in which we have
        no place: until the next one is published it may be meant for whom we are to replace."""
        if epoch == self.epoch and self.record is not None:
            return True
        self._counters["refused_frames"] += 1
        return False

    def _take(self, sender: Sender, message: StageInboxMessage) -> None:
        if isinstance(message, Pull):
            if self.accepts(message.epoch):
                self._pulls.start(message)
        elif not self.handle(sender, message) and self.driver is not None:
            self.driver.hear(sender, message)
            self.driver.pump()

    def tell_stage(self, name: str, message: StageInboxMessage) -> None:
        """Tells a stage of our pipeline, this one perhaps."""
        if name == self.options.name:
            self._take(Sender(name, self.incarnation), message)
        else:
            self.peers.send(name, message)

    def tell_driver(self, message: StageInboxMessage) -> None:
        """Tells stage 0 of our pipeline, unless we stand by."""
        if self.record is not None:
            self.tell_stage(self.record.stages[0].name, message)

    # ------------------------------------------------------------ steps

    def run(self, step: Step, hidden: memoryview | None = None) -> None:
        """Computes a step of this epoch; the next stage gets what comes out, or the driver."""
        self.engine.run(step, hidden, self._on_output)

    def _on_output(self, step: Step, output: StepOutput) -> None:
        if step.epoch != self.epoch or self.record is None:
            return
        swap = _slowest(step.swap, output.swap)
        if not self.options.is_last:
            following = self.record.stages[self.options.stage_index + 1]
            self.peers.send(following.name, msgspec.structs.replace(step, swap=swap), output.hidden)
            return
        done = StepDone(step.epoch, step.step, output.drawn, swap)
        if self.options.is_driver:
            self._step_done(done)
        else:
            self.peers.send(self.record.stages[0].name, done)

    def _step_done(self, done: StepDone) -> None:
        if self.driver is not None:
            self.driver.came_out(done)

    def overdue_s(self, *, hears_of_deaths: bool) -> float:
        """By how much the running step exceeds what is to be expected; 0: it does not. Where we would have heard that
        another stage is dead, one that does not come out of the pipeline counts, too."""
        overdue_s = self.engine.overdue_s()
        if self.driver is not None and hears_of_deaths:
            overdue_s = max(overdue_s, self.driver.overdue_s(time.monotonic()))
        return overdue_s

    # ------------------------------------------------------------ status

    def stats(self) -> dict[str, Any]:
        """What `status` tells of this stage. Its counters include those of its drivers of older epochs."""
        counters = Counter(self._counters)
        stats = {"loop": self.process.monitor.figures(), **self.engine.stats()}
        if self.driver is not None:
            counters.update(self.driver.costs())
            stats |= self.driver.stats()
        stats["counters"] = {**counters, **self.engine.counters, **stats.get("counters", {})}
        return stats

    def _answer_stats(self, query: StatsQuery) -> None:
        reply = StatsReply(query.query_id, self.options.name, msgspec.msgpack.encode(self.stats()))
        self.peers.send(query.reply_to, reply)


def _slowest(one: SwapFigures | None, other: SwapFigures | None) -> SwapFigures | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda figures: figures.copy_s)
