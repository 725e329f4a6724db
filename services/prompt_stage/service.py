"""Wiring of a prompt stage: every layer's KV leaves for the token stages as soon as it exists."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, assert_never

from common.handoff_messages import HandoffEnded, LetGo
from common.kv.checksum import hash_tokens
from common.kv.errors import LinkError
from common.kv.stream import HandoffSpan
from common.membership import MemberRecord, PipelineRecord
from common.messages import (
    CancelPrefill,
    FirstToken,
    Prefill,
    SequenceOpen,
    StageInboxMessage,
    StageReady,
    Step,
    StepDone,
)
from common.model.spec import ModelSpec
from common.replica_messages import Claim, Claimed, Pull, Pulled
from common.stage.life import StageLife
from common.stage.options import StageOptions
from common.stage.pulls import Pulls, shares
from common.stage.role import Sender
from common.stage.service import StageService
from common.stage.worker import StageSequence, StageWorker
from services.prompt_stage.handoffs import Handoffs
from services.prompt_stage.scheduler import Action, DeliverFirst, NeverStarted, PromptScheduler, PullHeld

logger = logging.getLogger(__name__)


class PromptStage(StageService):
    """Layers [a, b) of a prompt pipeline; stage 0 drives it."""

    def __init__(self, options: StageOptions, spec: ModelSpec, life: StageLife) -> None:
        super().__init__(options, spec, life)
        self._scheduler: PromptScheduler | None = None
        self._handoffs: Handoffs
        self._pulls: Pulls
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="pull")
        self._claims: dict[Claim, str] = {}
        """not answered yet, and by whom"""

    # ------------------------------------------------------------ the stage's part

    async def open_pool(self) -> dict[str, str]:
        options = self.options
        self._handoffs = Handoffs(
            options.pipeline,
            self.incarnation,
            options.stage_index,
            options.num_stages,
            options.link,
            self.peers.send,
        )
        await self._handoffs.start(self.pool)
        self._pulls = Pulls(self.pool, self._copier, self._pulled)
        return {}

    def _pulled(self, pull: Pull, intact: bool) -> None:
        self._tell_driver(Pulled(pull.epoch, pull.sequence_id, pull.attempt, intact))

    async def member_joined(self, record: MemberRecord) -> None:
        if record.role == "cache_store":
            await self._pulls.store_joined(record)

    async def member_lost(self, record: MemberRecord) -> None:
        if record.role == "cache_store":
            await self._pulls.store_lost(record.name)
        elif record.role == "token_stage" and self._scheduler is not None:
            pipeline = self.records.get(str(record.pipeline))
            if pipeline is not None and any(stage.incarnation == record.incarnation for stage in pipeline.stages):
                # its next epoch asks again for what this one was granted
                self._carry_out(self._scheduler.cancel_older(pipeline.pipeline, pipeline.epoch + 1))
                self.pump()

    async def quiesce(self) -> None:
        await self._pulls.idle()
        # token drivers take back the blocks that our older epochs were granted
        await self._handoffs.reset(self.epoch)
        for record in self.records.values():
            self._open_links(record)

    async def leave(self, record: PipelineRecord) -> None:
        await self._pulls.idle()
        await self._handoffs.reset(record.epoch)

    def _open_links(self, record: PipelineRecord) -> None:
        if record.role == "token_stage" and record.successor is None:
            self.in_background(self._handoffs.open(record))

    async def close_pool(self) -> None:
        await self._pulls.aclose()
        self._copier.shutdown(wait=True, cancel_futures=True)
        await self._handoffs.aclose()

    async def pipeline_published(self, record: PipelineRecord) -> None:
        if record.role == "token_stage":
            await self._handoffs.attach(record)
            self._answer_claims()
            self._open_links(record)
            if self._scheduler is not None:
                self._carry_out(self._scheduler.cancel_older(record.pipeline, record.epoch))
                self.pump()

    def _answer_claims(self) -> None:
        """Whoever claims a pipeline for an epoch hears when we hand off to its stages of that epoch."""
        for claim, driver in list(self._claims.items()):
            if self._handoffs.epoch_of(claim.pipeline) >= claim.epoch:
                del self._claims[claim]
                self.peers.send(driver, Claimed(self.options.name, claim.pipeline, claim.epoch, []))

    def new_worker(self) -> StageWorker:
        handoffs = self._handoffs
        spans: list[HandoffSpan] = []

        def on_layer(step: Step, local_layer: int) -> None:
            nonlocal spans
            if local_layer == 0:
                spans = handoffs.spans(step, worker.sequences)
            with self._clock.excused():  # where too much waits, it is for a token stage that does not answer
                handoffs.submit(spans, local_layer)

        def on_close(sequence: StageSequence) -> None:
            drained = functools.partial(self._drained, epoch, sequence.opened)
            future = handoffs.drain(sequence.opened)
            future.add_done_callback(lambda done: self._on_loop(functools.partial(drained, done)))

        epoch, worker = self.epoch, self.make_worker(on_layer, on_close)
        return worker

    def _on_loop(self, work: Callable[[], None]) -> None:
        self.loop.call_soon_threadsafe(work)

    def _drained(self, epoch: int, opened: SequenceOpen, done: Future[LinkError | None]) -> None:
        """Nothing reads the blocks of a closed sequence any more."""
        crash = done.exception()
        if crash is not None:
            self._on_crash(crash)
            return
        self._handoffs.ended(opened, done.result())
        if epoch == self.epoch:
            self._tell_driver(LetGo(epoch, opened.sequence_id, opened.attempt))

    def _tell_driver(self, message: Pulled | LetGo) -> None:
        if self.options.is_driver:
            self.handle(Sender(self.options.name, self.incarnation), message)
        elif self.record is not None:
            self.peers.send(self.record.stages[0].name, message)

    # ------------------------------------------------------------ the driver's part

    def new_driver(self, epoch: int, stages: list[StageReady]) -> None:
        self._scheduler = PromptScheduler(
            epoch=epoch,
            num_stages=self.options.num_stages,
            num_blocks=min(stage.num_blocks for stage in stages),
            block_size=self.options.block_size,
            chunk_tokens=self.options.chunk_tokens,
        )

    def end_driver(self) -> None:
        self._scheduler = None

    def next_step(self) -> Step | None:
        return None if self._scheduler is None else self._scheduler.next_step()

    def pump(self) -> None:
        super().pump()
        if self._scheduler is not None:
            self._carry_out(self._scheduler.take_pulls())

    def step_done(self, done: StepDone) -> None:
        if self._scheduler is not None:
            self._carry_out(self._scheduler.step_done(done.step, done.drawn))

    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        if isinstance(message, Claim):
            self._claims[message] = sender.name
            self._answer_claims()
            return
        if isinstance(message, Pull):
            if self.accepts(message.epoch):
                self._pulls.start(message)
            return
        if self._scheduler is None:
            return
        match message:
            case Prefill():
                if self.accepts(message.epoch):
                    self._scheduler.prefill(message)
            case CancelPrefill(sequence_id, attempt):
                self._carry_out(self._scheduler.cancel(sequence_id, attempt))
            case LetGo(epoch, sequence_id, attempt):
                if self.accepts(epoch):
                    self._scheduler.let_go(sequence_id, attempt)
            case Pulled(epoch, sequence_id, attempt, intact):
                if self.accepts(epoch):
                    self._carry_out(self._scheduler.pulled(sequence_id, attempt, intact))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender.name)
        self.pump()

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            prefill = action.prefill
            if isinstance(action, PullHeld):
                self._pull_held(prefill, action.blocks)
                continue
            record = self.records.get(prefill.handoff.pipeline)
            if record is None or record.epoch != prefill.handoff.epoch:
                continue
            driver, epoch = record.stages[0].name, record.epoch
            match action:
                case DeliverFirst(_, drawn, num_computed):
                    first = FirstToken(epoch, prefill.sequence_id, prefill.attempt, drawn, num_computed)
                    self.peers.send(driver, first)
                case NeverStarted():
                    for stage in range(self.options.num_stages):
                        self.peers.send(
                            driver,
                            HandoffEnded(epoch, prefill.sequence_id, prefill.attempt, stage, self.options.num_stages),
                        )
                case _:
                    assert_never(action)

    def _pull_held(self, prefill: Prefill, blocks: list[int]) -> None:
        held = prefill.held
        if held is None or self.record is None:
            return
        token_hash = hash_tokens(prefill.token_ids[: 4 * held.num_tokens])
        wanted = Pull(
            self.epoch, prefill.sequence_id, prefill.attempt, prefill.held_by, held.num_tokens, held.blocks,
            blocks, token_hash, held.checksums,
        )  # fmt: skip
        for name, pull in shares(wanted, self.record):
            if name == self.options.name:
                self._pulls.start(pull)
            else:
                self.peers.send(name, pull)

    # ------------------------------------------------------------ status

    def role_stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = {
            "kv_blocks": self.kv_blocks(),
            **self._handoffs.stats(),
        }
        if self._scheduler is not None:
            stats["kv_blocks"] = self._scheduler.kv_blocks()
            stats["retained"] = self._scheduler.retained()
            stats["sequences"] = {
                "running": self._scheduler.num_running,
                "waiting": self._scheduler.num_waiting,
            }
        return stats
