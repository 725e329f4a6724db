"""The driver of a token pipeline: what it hears goes to the scheduler, what that decides is carried out."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, assert_never

from common.handoff_messages import EndAwaited, FenceOff
from common.kv.token_ids import ID_BYTES
from common.membership import MemberRecord, PipelineRecord
from common.messages import (
    Admit,
    CancelPrefill,
    CancelSequence,
    Orphans,
    PipelineReady,
    ProducedToken,
    SequenceFailed,
    SequencesUnknown,
    StageInboxMessage,
    StageReady,
    Step,
    StepDone,
    TokensAwaited,
    TokensProduced,
    pack_ids,
    unpack_ids,
)
from common.replica_messages import replica_key
from common.stage.driver import Driver, OwnStage
from common.stage.role import Sender
from services.token_stage.audience import Audience, Listener
from services.token_stage.events import Event, take
from services.token_stage.prompt_pipelines import LEAVE_S, PromptPipelines
from services.token_stage.replication import Replication
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Action, AskStore, Fail, Grant, Produce, PullReplica, StopPrefill
from services.token_stage.swapping import device_tier
from services.token_stage.table import PipelineShape

logger = logging.getLogger(__name__)

ORPHAN_S = 30.0
"""How long a sequence whose router died waits for the next one to ask for it."""


class TokenDriver(Driver):
    """`prompts` is what its stage knows of prompt pipelines, whatever the epoch."""

    min_trip_limit_s = 5.0
    """No stage of it waits for anybody else."""

    def __init__(
        self, stage: OwnStage, record: PipelineRecord, ready: list[StageReady], prompts: PromptPipelines
    ) -> None:
        super().__init__(stage, record, ready)
        options = stage.options
        shape = PipelineShape(
            epoch=self.epoch,
            num_stages=options.num_stages,
            num_layers=stage.spec.num_layers,
            num_blocks=min(each.num_blocks for each in ready),
            block_size=options.block_size,
            eos_token_ids=stage.spec.eos_token_ids,
            chunk_tokens=options.chunk_tokens,
            is_colocated=options.is_colocated,
            durability=options.durability,
        )
        self.scheduler = TokenScheduler(shape, self._new_replication(), device_tier(options.swap, ready))
        self._table, self._intake = self.scheduler.table, self.scheduler.intake
        self._admissions, self._patience = self.scheduler.admissions, self.scheduler.patience
        self._audience = Audience()
        self._dead_routers: set[Sender] = set()
        """what they had sent may still arrive"""
        self._prompts = prompts
        self._waiting: list[Grant] = []
        """no prompt pipeline was there for these"""

    def _new_replication(self) -> Replication:
        options, record = self.stage.options, self.record
        replication = Replication(
            record.pipeline, record.epoch, options.block_size, options.num_replicas, options.recovery
        )
        for member in self.stage.members.values():
            if member.role == "cache_store":
                replication.store_joined(member.name, was_there=True)
            elif member.role == "prompt_stage":
                replication.writer_was_there(member.name)
        return replication

    def begin(self) -> None:
        for record in self.stage.records.values():
            self._fence_off_older(record)
        self.remind()

    def remind(self) -> None:
        """Also while nothing else happens."""
        super().remind()
        self._carry_out(self._patience.ask_again())
        self._carry_out(self._patience.give_up_stalled(self.stage.process.loop.time()))
        self._table.replication.claim_again()
        self._ask_writers()
        for index, stage in enumerate(self.record.stages):
            oldest = self._table.fences.unanswered(index)
            if oldest:
                self.stage.tell_stage(stage.name, FenceOff(self.epoch, oldest))

    def _ask_writers(self) -> None:
        """What the end of a hand-off is waited for, and that nobody wants others any more."""
        for (pipeline, epoch), sequences in self._patience.awaited().items():
            record = self.stage.records.get(pipeline)
            if record is None or record.epoch != epoch or record.successor is not None:
                continue  # its next epoch, or another pipeline, is asked for all of it
            for sequence in sequences:
                if sequence.is_leaving:
                    self._stop_prefill(sequence.sequence_id, sequence.attempt)
            handoffs = [(sequence.sequence_id, sequence.attempt) for sequence in sequences]
            awaited = EndAwaited(epoch, self.record.pipeline, self.epoch, handoffs)
            self.stage.peers.send(record.stages[0].name, awaited)

    # ------------------------------------------------------------ steps

    def next_step(self) -> Step | None:
        return self.scheduler.next_step()

    def step_done(self, done: StepDone) -> None:
        self._carry_out(self.scheduler.step_done(done.step, done.drawn, now_s=time.monotonic(), swap=done.swap))

    def pump(self) -> None:
        """Also sends what has come up for stages and stores."""
        super().pump()
        oldest = self._table.fences.take_asked()
        if oldest:
            for stage in self.record.stages:
                self.stage.tell_stage(stage.name, FenceOff(self.epoch, oldest))
        for store, message in self._table.replication.flush(self.stage.process.loop.time()):
            self.stage.peers.send(store, message)

    # ------------------------------------------------------------ what it hears

    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        match message:
            case PipelineReady(pipeline):
                self._prompts_ready(pipeline)
            case Admit():
                # a dead one's successor may have given us the same sequence already: that one has a reader
                if self.stage.accepts(message.epoch) and sender not in self._dead_routers:
                    self._admit(sender, message)
            case TokensAwaited(epoch, sequences):
                if self.stage.accepts(epoch) and sender not in self._dead_routers:
                    self._tell_again(sender, sequences)
            case CancelSequence(sequence_id):
                ours = self._audience.called(sequence_id)
                if ours is not None:
                    self._cancel(ours)
            case _ if isinstance(message, Event):
                if self.stage.accepts(message.epoch):
                    self._carry_out(take(self.scheduler, message))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender.name)

    def _admit(self, router: Sender, admit: Admit) -> None:
        if self._admissions.is_outdated(admit.sequence_id, admit.placed):
            logger.info("%s of %s was on its way for too long", admit.sequence_id, router.name)
            return
        prompt, forced = unpack_ids(admit.prompt), unpack_ids(admit.forced)
        was_elsewhere = admit.came_from not in ("", self.record.pipeline)
        self._admissions.placed_again(admit.sequence_id, admit.placed, admit.follows, was_elsewhere=was_elsewhere)
        sequence_id, actions = self._admissions.adopt(admit.sequence_id, prompt, forced, admit.params) or (
            admit.sequence_id,
            self._admissions.admit(admit.sequence_id, admit.choice, prompt, forced, admit.params, admit.placed),
        )
        self._audience.enter(sequence_id, admit, router)
        self._carry_out(actions)

    def _tell_again(self, router: Sender, sequences: list[tuple[str, int]]) -> None:
        """What a router lacks of its sequences; of some it may have to tell us again."""
        tokens: list[ProducedToken] = []
        unknown: list[str] = []
        for name, index in sequences:
            ours = self._audience.called(name)
            frames = None if ours is None else self._admissions.frames_from(ours, index)
            if frames is None:
                unknown.append(name)
            tokens += (ProducedToken(name, each.index, each.drawn, each.finish_reason) for each in frames or ())
        if tokens:
            self.stage.peers.send(router.name, TokensProduced(self.record.pipeline, self.epoch, tokens))
        if unknown:
            self.stage.peers.send(router.name, SequencesUnknown(self.record.pipeline, self.epoch, unknown))

    def _cancel(self, sequence_id: str) -> None:
        self._carry_out(self._admissions.cancel(sequence_id))
        self._audience.leave(sequence_id)

    def member_joined(self, record: MemberRecord) -> None:
        if record.role == "router":
            self._dead_routers.discard(Sender(record.name, record.incarnation))
            self._report_orphans(record.name, record.name)
        elif record.role == "cache_store":
            self._table.replication.store_joined(record.name, was_there=False)
        elif self._is_ours(record):
            self._carry_out(self._intake.stage_back(record.incarnation))

    def member_lost(self, record: MemberRecord) -> None:
        if record.role in ("cache_store", "prompt_stage"):
            self._carry_out(self._intake.store_lost(record.name))
            if record.role == "prompt_stage":
                self.later(LEAVE_S, self._leave_prompts, record)
        elif record.role == "router":
            self._router_lost(Sender(record.name, record.incarnation))
        elif self._is_ours(record):
            self._intake.stage_lost(record.incarnation)

    def _is_ours(self, member: MemberRecord) -> bool:
        """Whether it is a stage of our pipeline in this epoch."""
        return any(stage.incarnation == member.incarnation for stage in self.record.stages)

    def _router_lost(self, router: Sender) -> None:
        """Nobody reads the tokens of its sequences: they wait for its successor, whom its clients ask to go on."""
        self._dead_routers.add(router)
        for sequence_id in self._audience.of_router(router):
            self._admissions.orphan(sequence_id)
        for name in self.stage.routers():
            self._report_orphans(name, router.name)
        self.later(ORPHAN_S, self._end_orphans, router)

    def _report_orphans(self, to: str, dead: str) -> None:
        sequences = self._admissions.known() if to == dead else self._admissions.orphans()
        keys = [replica_key(sequence_id) for sequence_id in sequences]
        self.stage.peers.send(to, Orphans(self.record.pipeline, self.epoch, dead, keys))

    def _end_orphans(self, router: Sender) -> None:
        for sequence_id in self._audience.of_router(router):
            self._cancel(sequence_id)

    def pipeline_published(self, record: PipelineRecord) -> None:
        if record.role != "prompt_stage":
            return
        self._fence_off_older(record)
        if record.successor is not None:
            self._carry_out(self._intake.pipeline_replaced(record.pipeline, record.epoch))
        for stage in record.stages:
            self._table.replication.writer_is_back(stage.name)
        self._prompts_ready(record.pipeline)
        waiting, self._waiting = self._waiting, []
        self._carry_out(grant for grant in waiting if self._intake.is_granted(grant.sequence_id, grant.attempt))

    def _fence_off_older(self, record: PipelineRecord) -> None:
        """Whoever still writes for an older epoch of a prompt pipeline is to end before its prompts are asked for
        again."""
        if record.role == "prompt_stage":
            self._table.fences.ask({record.pipeline: record.epoch})

    def _prompts_ready(self, pipeline: str) -> None:
        """What older epochs of it had not finished is asked of its newest, once that is both published and ready."""
        record = self.stage.records.get(pipeline)
        if record is not None and self._prompts.epoch(record):
            self._carry_out(self._intake.pipeline_replaced(pipeline, record.epoch))

    def _leave_prompts(self, lost: MemberRecord) -> None:
        left = self._prompts.leave(lost, self.stage.records)
        if left is not None:
            self._carry_out(self._intake.pipeline_replaced(left.pipeline, left.epoch + 1))

    # ------------------------------------------------------------ what is to be done

    def _carry_out(self, actions: Iterable[Action]) -> None:
        produced: dict[str, list[ProducedToken]] = defaultdict(list)
        ended: list[str] = []
        for action in actions:
            listener = self._audience.of(action.sequence_id)
            if listener is None:
                continue
            if isinstance(action, Produce):
                token = ProducedToken(listener.admit.sequence_id, action.index, action.drawn, action.finish_reason)
                produced[listener.router.name].append(token)
            else:
                self._perform(action, listener)
            if isinstance(action, Fail) or (isinstance(action, Produce) and action.finish_reason is not None):
                ended.append(action.sequence_id)
        for router, tokens in produced.items():
            self.stage.peers.send(router, TokensProduced(self.record.pipeline, self.epoch, tokens))
        for sequence_id in ended:
            self._audience.leave(sequence_id)

    def _perform(self, action: Grant | AskStore | PullReplica | StopPrefill | Fail, listener: Listener) -> None:
        match action:
            case Grant():
                self._request_prefill(listener.admit, action)
            case AskStore(sequence_id, store):
                self._ask_store(sequence_id, store)
            case PullReplica(sequence_id):
                self._pull_replica(sequence_id)
            case StopPrefill(sequence_id, attempt):
                self._stop_prefill(sequence_id, attempt)
            case Fail(_, error):
                failed = SequenceFailed(self.record.pipeline, self.epoch, listener.admit.sequence_id, error)
                self.stage.peers.send(listener.router.name, failed)
            case _:
                assert_never(action)

    def _request_prefill(self, admit: Admit, grant: Grant) -> None:
        """Sends the grant and the work to a prompt pipeline that can hold it."""
        record = self._prompts.pick(admit.prompt_pipeline, self.stage.records)
        if record is None:
            self._waiting.append(grant)
            return
        num_tokens = len(admit.prompt) // ID_BYTES + len(grant.forced)
        capacity = self._prompts.capacity_tokens(record.pipeline)
        if capacity is not None and num_tokens > capacity:
            self._intake.compute_here(grant.sequence_id)
            return
        self._intake.assign_writer(grant.sequence_id, record.pipeline, self._prompts.epoch(record))
        prefill = self._prompts.prefill(record, admit, grant, (self.record.pipeline, self.epoch))
        self.stage.peers.send(record.stages[0].name, prefill)

    def _stop_prefill(self, sequence_id: str, attempt: int) -> None:
        writer = self._intake.writer(sequence_id)
        record = None if writer is None else self.stage.records.get(writer[0])
        if record is not None:
            self.stage.peers.send(record.stages[0].name, CancelPrefill(sequence_id, attempt))

    def _ask_store(self, sequence_id: str, store: str) -> None:
        sequence = self._table.sequences.get(sequence_id)
        if sequence is not None:
            self.stage.peers.send(*self._table.replication.locate(store, sequence))

    def _pull_replica(self, sequence_id: str) -> None:
        """Has every stage copy its layers; each answers with `Pulled`."""
        sequence = self._table.sequences.get(sequence_id)
        if sequence is not None and sequence.replica is not None:
            token_ids = pack_ids(sequence.tokens)
            self.pull(sequence_id, sequence.attempt, sequence.source, sequence.replica, sequence.blocks, token_ids)

    # ------------------------------------------------------------ status

    def costs(self) -> Mapping[str, int]:
        return asdict(self._table.costs)

    def stats(self) -> dict[str, Any]:
        table = self._table
        lag_tokens = table.replication.lag_tokens()
        stats: dict[str, Any] = {
            "kv_blocks": table.allocator.figures(),
            "replication": {"lag_tokens": lag_tokens, "stores": table.replication.num_stores},
            "recovery": {"epoch": self.epoch, "most_recomputed_tokens": table.most_recomputed_tokens},
            "counters": {"replica_lag_tokens": lag_tokens},
            "sequences": {"running": table.num_running, "waiting": table.num_waiting},
        }
        if table.device is not None:
            stats["swap"] = table.device.describe()
        return stats
