"""The driver of a prompt pipeline: what it hears goes to the scheduler, what that decides is carried out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, assert_never

from common.handoff_messages import EndAwaited, HandoffEnded, LetGo, LetGoAwaited
from common.membership import MemberRecord, PipelineRecord
from common.messages import CancelPrefill, FirstToken, Prefill, StageInboxMessage, StageReady, Step, StepDone
from common.replica_messages import Pulled
from common.stage.driver import Driver, OwnStage
from common.stage.role import Sender
from services.prompt_stage.scheduler import Action, DeliverFirst, Key, NeverStarted, PromptScheduler, PullHeld

logger = logging.getLogger(__name__)


class PromptDriver(Driver):
    """Tells token drivers what becomes of the prompts that they ask for."""

    def __init__(self, stage: OwnStage, record: PipelineRecord, ready: list[StageReady]) -> None:
        super().__init__(stage, record, ready)
        options = stage.options
        self.scheduler = PromptScheduler(
            epoch=self.epoch,
            num_stages=options.num_stages,
            num_blocks=min(each.num_blocks for each in ready),
            block_size=options.block_size,
            chunk_tokens=options.chunk_tokens,
        )

    def next_step(self) -> Step | None:
        return self.scheduler.next_step()

    def step_done(self, done: StepDone) -> None:
        self._carry_out(self.scheduler.step_done(done.step, done.drawn))

    def pump(self) -> None:
        """Also has replicas pulled that prompts wait for."""
        super().pump()
        self._carry_out(self.scheduler.take_pulls())

    def remind(self) -> None:
        super().remind()
        for index, stage in enumerate(self.record.stages):
            prompts = self.scheduler.not_let_go(index)
            if prompts:
                self.stage.tell_stage(stage.name, LetGoAwaited(self.epoch, prompts))

    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        match message:
            case Prefill():
                if self.stage.accepts(message.epoch):
                    self.scheduler.prefill(message)
            case CancelPrefill(sequence_id, attempt):
                self._carry_out(self.scheduler.cancel(sequence_id, attempt))
            case EndAwaited():
                if self.stage.accepts(message.epoch):
                    self._answer(sender, message)
            case LetGo(epoch, sequence_id, attempt, asked_in, stage_index, unconfirmed):
                if self.stage.accepts(epoch):
                    self.scheduler.let_go((sequence_id, attempt, asked_in), stage_index, unconfirmed)
            case Pulled(_, sequence_id, attempt, intact):
                self._carry_out(self.scheduler.pulled(sequence_id, attempt, intact))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender.name)

    def member_lost(self, record: MemberRecord) -> None:
        pipeline = self.stage.records.get(str(record.pipeline)) if record.role == "token_stage" else None
        if pipeline is not None and any(stage.incarnation == record.incarnation for stage in pipeline.stages):
            # its next epoch asks again for what this one was granted
            self._carry_out(self.scheduler.cancel_older(pipeline.pipeline, pipeline.epoch + 1))

    def pipeline_published(self, record: PipelineRecord) -> None:
        if record.role == "token_stage":
            self._carry_out(self.scheduler.cancel_older(record.pipeline, record.epoch))

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            prefill = action.prefill
            record = self.stage.records.get(prefill.handoff.pipeline)
            if isinstance(action, PullHeld):
                self._pull_held(prefill, action.blocks)
            elif record is not None and record.epoch == prefill.handoff.epoch:
                self._tell(record, action)

    def _tell(self, record: PipelineRecord, action: DeliverFirst | NeverStarted) -> None:
        """Tells the token driver that asked, whose pipeline's record this is."""
        driver, prefill = record.stages[0].name, action.prefill
        sequence_id, attempt = prefill.sequence_id, prefill.attempt
        match action:
            case DeliverFirst(_, drawn, num_computed):
                self.stage.peers.send(driver, FirstToken(record.epoch, sequence_id, attempt, drawn, num_computed))
            case NeverStarted():
                self._tell_end(driver, record.epoch, (sequence_id, attempt))
            case _:
                assert_never(action)

    def _answer(self, asker: Sender, awaited: EndAwaited) -> None:
        """Tells a token driver what has ended without its knowledge. It was told before, so what its stages were told
        of the KV over the same connections is lost, too: it need not wait for it."""
        unknown, unconfirmed = self.scheduler.disown(awaited.handoffs, (awaited.pipeline, awaited.pipeline_epoch))
        for key in unknown:
            self._tell_end(asker.name, awaited.pipeline_epoch, key, "its end was not heard of", unconfirmed)

    def _tell_end(
        self, driver: str, epoch: int, handoff: Key, error: str | None = None, unconfirmed: dict[str, int] | None = None
    ) -> None:
        """No stage of ours writes any more for this attempt, at this epoch of a token pipeline."""
        num_stages = self.stage.options.num_stages
        for stage in range(num_stages):
            self.stage.peers.send(driver, HandoffEnded(epoch, *handoff, stage, num_stages, error, unconfirmed or {}))

    def _pull_held(self, prefill: Prefill, blocks: list[int]) -> None:
        if prefill.held is not None:
            self.pull(prefill.sequence_id, prefill.attempt, prefill.held_by, prefill.held, blocks, prefill.token_ids)

    def stats(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "kv_blocks": scheduler.kv_blocks(),
            "retained": scheduler.retained(),
            "sequences": {"running": scheduler.num_running, "waiting": scheduler.num_waiting},
        }
