"""Wiring of a token stage: what arrives is verified, the driver's decisions are carried out."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, assert_never

from common.handoff_messages import FencedOff, FenceOff, KvArrived, KvConfirmed
from common.kv.server import PoolServer
from common.membership import MemberRecord, PipelineRecord
from common.messages import (
    Admit,
    CancelPrefill,
    CancelSequence,
    Orphans,
    PipelineReady,
    ProducedToken,
    SequenceFailed,
    StageInboxMessage,
    StageReady,
    Step,
    StepDone,
    TokensProduced,
    unpack_ids,
)
from common.model.spec import ModelSpec
from common.replica_messages import Claim, Claimed, Pull, Pulled, replica_key
from common.stage.life import StageLife
from common.stage.options import StageOptions
from common.stage.pulls import Pulls, shares
from common.stage.role import Sender
from common.stage.service import StageService
from services.token_stage.arrivals import Arrivals
from services.token_stage.audience import Audience
from services.token_stage.door import Door
from services.token_stage.events import Event, take
from services.token_stage.figures import driver_stats
from services.token_stage.guests import Guests
from services.token_stage.prompt_pipelines import PromptPipelines
from services.token_stage.replication import REPEAT_S, Replication
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import (
    Action,
    AskStore,
    Fail,
    Grant,
    Produce,
    PullReplica,
    StopPrefill,
)
from services.token_stage.swapping import device_tier
from services.token_stage.table import PipelineShape

logger = logging.getLogger(__name__)

ORPHAN_S = 30.0
"""How long a sequence whose router died waits for the next one to ask for it."""


class TokenStage(StageService):
    """Layers [a, b) of a token pipeline, with the pool that prompt stages write into."""

    def __init__(self, options: StageOptions, spec: ModelSpec, life: StageLife) -> None:
        super().__init__(options, spec, life)
        self._scheduler: TokenScheduler | None = None
        self._audience = Audience()
        self._prompts = PromptPipelines()
        self._totals = Counter[str]()
        """what the drivers of older epochs counted"""
        self._door: Door
        self._guests = Guests()
        self._pulls: Pulls
        self._arrivals: Arrivals
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="verify")

    # ------------------------------------------------------------ the stage's part

    async def open_pool(self) -> dict[str, str]:
        server = await PoolServer.start(self.pool, self.options.host, self.incarnation)
        self._door = Door(server, self.options.stage_index, self._stop.set)
        self._pulls = Pulls(self.pool, self._verifier, self._pulled)
        self._arrivals = Arrivals(self.pool, self._verifier, self._tell_driver)
        return {"kv_offer": self._door.offer}

    async def close_pool(self) -> None:
        await self._pulls.aclose()
        self._verifier.shutdown(wait=True, cancel_futures=True)
        await self._door.aclose()

    def _pulled(self, pull: Pull, intact: bool) -> None:
        self._tell_driver(Pulled(pull.epoch, pull.sequence_id, pull.attempt, intact))

    def _fenced_off(self, fenced: FencedOff) -> None:
        if fenced.epoch == self.epoch:
            self._tell_driver(fenced)

    def _tell_driver(self, message: KvConfirmed | Pulled | FencedOff) -> None:
        if self.options.is_driver:
            self.handle(Sender(self.options.name, self.incarnation), message)
        elif self.record is not None:
            self.peers.send(self.record.stages[0].name, message)

    async def quiesce(self) -> None:
        await self._pulls.idle()
        fenced = self._door.begin_epoch(self.options.pipeline, self.epoch)
        if self.record is None:
            self.in_background(fenced)  # nobody waits for a spare
        else:
            await fenced

    async def leave(self, record: PipelineRecord) -> None:
        await self._pulls.idle()
        await self._door.begin_epoch(record.pipeline, record.epoch)
        stores = [member.name for member in self.members.values() if member.role == "cache_store"]
        for name in stores:
            self.peers.send(name, Claim(record.pipeline, record.epoch))
        await self._guests.gone(stores)

    # ------------------------------------------------------------ the driver's part

    def new_driver(self, epoch: int, stages: list[StageReady]) -> None:
        self.end_driver()
        options = self.options
        replication = Replication(options.pipeline, epoch, options.block_size, options.num_replicas, options.recovery)
        for member in self.members.values():
            if member.role == "cache_store":
                replication.store_joined(member.name, was_there=True)
            elif member.role == "prompt_stage":
                replication.writer_was_there(member.name)
        shape = PipelineShape(
            epoch=epoch,
            num_stages=options.num_stages,
            num_layers=self.spec.num_layers,
            num_blocks=min(stage.num_blocks for stage in stages),
            block_size=options.block_size,
            eos_token_ids=self.spec.eos_token_ids,
            chunk_tokens=options.chunk_tokens,
            is_colocated=options.is_colocated,
            durability=options.durability,
        )
        self._scheduler = TokenScheduler(shape, replication, device_tier(options.swap, stages))
        for record in self.records.values():
            self._fence_off_older(record)
        self._remind(self._scheduler)

    def _remind(self, scheduler: TokenScheduler) -> None:
        """What nobody answers is sent again, also while nothing else happens."""
        if scheduler is self._scheduler:
            self._carry_out(scheduler.ask_again())
            self.pump()
            self.loop.call_later(REPEAT_S, self._remind, scheduler)

    def end_driver(self) -> None:
        self._totals = self._counts()
        self._scheduler = None
        self._audience.clear()
        self._prompts.forget_waiting()

    def next_step(self) -> Step | None:
        return None if self._scheduler is None else self._scheduler.next_step()

    def pump(self) -> None:
        super().pump()
        if self._scheduler is not None:
            self._send_fences(self._scheduler)
            for store, message in self._scheduler.replication.flush(time.monotonic()):
                self.peers.send(store, message)

    def _send_fences(self, scheduler: TokenScheduler) -> None:
        oldest = scheduler.fences.take_asked()
        if oldest and self.record is not None:
            for stage in self.record.stages:
                self._to_stage(stage.name, FenceOff(self.epoch, oldest))

    def _to_stage(self, name: str, message: FenceOff | Pull) -> None:
        """To a stage of ours, this one perhaps."""
        if name == self.options.name:
            self.handle(Sender(name, self.incarnation), message)
        else:
            self.peers.send(name, message)

    def _fence_off_older(self, record: PipelineRecord) -> None:
        """Whoever still writes for an older epoch of a prompt pipeline is to end before its prompts are asked for
        again."""
        if record.role == "prompt_stage" and self._scheduler is not None:
            self._scheduler.fences.ask({record.pipeline: record.epoch})

    def step_done(self, done: StepDone) -> None:
        if self._scheduler is not None:
            now_s = time.monotonic()
            self._carry_out(self._scheduler.step_done(done.step, done.drawn, now_s=now_s, swap=done.swap))

    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        if isinstance(message, KvArrived):
            if self.accepts(message.epoch):
                self._arrivals.verify(message)
            return
        if isinstance(message, Pull):
            if self.accepts(message.epoch):
                self._pulls.start(message)
            return
        if isinstance(message, FenceOff):
            if self.accepts(message.epoch):
                self.in_background(self._door.fence_off(message, self._fenced_off))
            return
        if isinstance(message, PipelineReady):
            self._prompts.reported(message)
        scheduler = self._scheduler
        if scheduler is None:
            if isinstance(message, Claimed) and self.accepts(message.epoch):
                self._guests.left(message.name)
            return
        match message:
            case PipelineReady(pipeline):
                self._prompts_ready(scheduler, pipeline)
            case Admit():
                if self.accepts(message.epoch):
                    self._admit(scheduler, sender, message)
            case CancelSequence(sequence_id):
                ours = self._audience.called(sequence_id)
                if ours is not None:
                    self._cancel(scheduler, ours)
            case _ if isinstance(message, Event):
                if self.accepts(message.epoch):
                    self._carry_out(take(scheduler, message))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender.name)
        self.pump()

    async def member_joined(self, record: MemberRecord) -> None:
        if record.role == "router":
            self._report_orphans(record.name, record.name)
        if self._is_ours(record) and self._scheduler is not None:
            self._carry_out(self._scheduler.stage_back(record.incarnation))
        if record.role != "cache_store":
            return
        await self._pulls.store_joined(record)
        if self._scheduler is not None:
            self._scheduler.replication.store_joined(record.name, was_there=False)
            self.pump()

    async def member_lost(self, record: MemberRecord) -> None:
        if record.role == "cache_store":
            await self._pulls.store_lost(record.name)
            self._guests.left(record.name)
        elif record.role == "prompt_stage":
            self.in_background(self._door.writer_lost(record))
        if self._scheduler is None:
            return
        if record.role in ("cache_store", "prompt_stage"):
            self._carry_out(self._scheduler.store_lost(record.name))
        elif record.role == "router":
            self._router_lost(self._scheduler, Sender(record.name, record.incarnation))
        elif self._is_ours(record):
            self._scheduler.stage_lost(record.incarnation)
        self.pump()

    def _is_ours(self, member: MemberRecord) -> bool:
        """Whether it is a stage of our pipeline in this epoch."""
        return self.record is not None and any(s.incarnation == member.incarnation for s in self.record.stages)

    def _router_lost(self, scheduler: TokenScheduler, router: Sender) -> None:
        """Nobody reads the tokens of its sequences: they wait for its successor, whom its clients ask to go on."""
        for sequence_id in self._audience.of_router(router):
            scheduler.orphan(sequence_id)
        for member in self.members.values():
            if member.role == "router":
                self._report_orphans(member.name, router.name)
        self.loop.call_later(ORPHAN_S, self._end_orphans, scheduler, router)

    def _report_orphans(self, to: str, dead: str) -> None:
        if self._scheduler is not None:
            keys = [replica_key(sequence_id) for sequence_id in self._scheduler.orphans()]
            self.peers.send(to, Orphans(self.options.pipeline, self.epoch, dead, keys))

    def _end_orphans(self, scheduler: TokenScheduler, router: Sender) -> None:
        if scheduler is self._scheduler:
            for sequence_id in self._audience.of_router(router):
                self._cancel(scheduler, sequence_id)
            self.pump()

    def _admit(self, scheduler: TokenScheduler, router: Sender, admit: Admit) -> None:
        prompt, forced = unpack_ids(admit.prompt), unpack_ids(admit.forced)
        adopted = scheduler.adopt(admit.sequence_id, prompt, forced, admit.params)
        if adopted is None:
            self._audience.enter(admit.sequence_id, admit, router)
            self._carry_out(scheduler.admit(admit.sequence_id, admit.choice, prompt, forced, admit.params))
            return
        sequence_id, actions = adopted
        self._audience.enter(sequence_id, admit, router)
        self._carry_out(actions)

    def _cancel(self, scheduler: TokenScheduler, sequence_id: str) -> None:
        self._carry_out(scheduler.cancel(sequence_id))
        self._audience.leave(sequence_id)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        produced: dict[str, list[ProducedToken]] = defaultdict(list)
        ended: list[str] = []
        for action in actions:
            listener = self._audience.of(action.sequence_id)
            if listener is None:
                continue
            match action:
                case Produce(sequence_id, index, drawn, reason):
                    token = ProducedToken(listener.admit.sequence_id, index, drawn, reason)
                    produced[listener.router.name].append(token)
                    if reason is not None:
                        ended.append(sequence_id)
                case Grant():
                    self._request_prefill(listener.admit, action)
                case AskStore(sequence_id, store):
                    self._ask_store(sequence_id, store)
                case PullReplica(sequence_id):
                    self._pull_replica(sequence_id)
                case StopPrefill(sequence_id, attempt):
                    self._stop_prefill(sequence_id, attempt)
                case Fail(sequence_id, error):
                    failed = SequenceFailed(self.options.pipeline, self.epoch, listener.admit.sequence_id, error)
                    self.peers.send(listener.router.name, failed)
                    ended.append(sequence_id)
                case _:
                    assert_never(action)
        for router, tokens in produced.items():
            self.peers.send(router, TokensProduced(self.options.pipeline, self.epoch, tokens))
        for sequence_id in ended:
            self._audience.leave(sequence_id)

    def _request_prefill(self, admit: Admit, grant: Grant) -> None:
        """Sends the grant and the work to a prompt pipeline that can hold it."""
        scheduler = self._scheduler
        record = self._prompts.pick(grant, admit.prompt_pipeline, self.records)
        if record is None or scheduler is None:
            return
        pipeline = record.pipeline
        num_tokens = len(admit.prompt) // 4 + len(grant.forced)
        capacity = self._prompts.capacity_tokens(pipeline)
        if capacity is not None and num_tokens > capacity:
            scheduler.compute_here(grant.sequence_id)
            return
        scheduler.assign_writer(grant.sequence_id, pipeline, self._prompts.epoch(record))
        prefill = self._prompts.prefill(record, admit, grant, (self.options.pipeline, self.epoch))
        self.peers.send(record.stages[0].name, prefill)

    def _prompts_ready(self, scheduler: TokenScheduler, pipeline: str) -> None:
        """What older epochs of it had not finished is asked of its newest, once that is both published and ready."""
        if (record := self.records.get(pipeline)) is not None and self._prompts.epoch(record):
            self._carry_out(scheduler.pipeline_replaced(pipeline, record.epoch))

    async def pipeline_published(self, record: PipelineRecord) -> None:
        self._fence_off_older(record)
        if record.role == "prompt_stage" and record.successor is not None:
            self._prompts.over(record.pipeline)
        if record.role == "prompt_stage" and self._scheduler is not None:
            if record.successor is not None:
                self._carry_out(self._scheduler.pipeline_replaced(record.pipeline, record.epoch))
            for stage in record.stages:
                self._scheduler.replication.writer_is_back(stage.name)
            self._prompts_ready(self._scheduler, record.pipeline)
            waiting = self._prompts.take_waiting()
            self._carry_out(g for g in waiting if self._scheduler.is_granted(g.sequence_id, g.attempt))
            self.pump()

    def _ask_store(self, sequence_id: str, store: str) -> None:
        sequence = None if self._scheduler is None else self._scheduler.restoring(sequence_id)
        if sequence is not None and self._scheduler is not None:
            self.peers.send(*self._scheduler.replication.locate(store, sequence))

    def _pull_replica(self, sequence_id: str) -> None:
        """Has every stage copy its layers; each answers with `Pulled`."""
        sequence = None if self._scheduler is None else self._scheduler.restoring(sequence_id)
        if sequence is None or sequence.replica is None or self.record is None:
            return
        for name, pull in shares(sequence.pull(self.epoch, sequence.replica), self.record):
            self._to_stage(name, pull)

    def _stop_prefill(self, sequence_id: str, attempt: int) -> None:
        writer = None if self._scheduler is None else self._scheduler.writer(sequence_id)
        record = None if writer is None else self.records.get(writer[0])
        if record is not None:
            self.peers.send(record.stages[0].name, CancelPrefill(sequence_id, attempt))

    # ------------------------------------------------------------ status

    def _counts(self) -> Counter[str]:
        counts = Counter(self._totals)
        if self._scheduler is not None:
            counts.update(asdict(self._scheduler.costs))
        return counts

    def role_stats(self) -> dict[str, Any]:
        scheduler = self._scheduler
        driver = {} if scheduler is None else driver_stats(scheduler, self._counts(), self._pulls.received_bytes)
        return {"kv_blocks": self.kv_blocks(), "handoff": self._arrivals.stats(), **self._door.stats(), **driver}
