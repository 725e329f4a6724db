"""Wiring of a token stage: what arrives is verified, the driver's decisions are carried out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, assert_never

from common.kv.arrival import verify_arrival
from common.kv.server import PoolServer
from common.membership import MemberRecord
from common.messages import (
    Admit,
    CancelPrefill,
    CancelSequence,
    Drawn,
    FirstToken,
    Handoff,
    HandoffEnded,
    KvArrived,
    KvConfirmed,
    PipelineReady,
    Prefill,
    ProducedToken,
    SequenceFailed,
    StageInboxMessage,
    Step,
    TokensProduced,
    pack_ids,
    unpack_ids,
)
from common.model.spec import ModelSpec
from common.stage.options import StageOptions
from common.stage.service import Sender, StageService
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Action, Fail, Grant, Produce, StopPrefill

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _LiveSequence:
    """Whom to tell about a sequence: the router it came from, the prompt pipeline that computes its prompt."""

    admit: Admit
    router: Sender


class TokenStage(StageService):
    """Layers [a, b) of a token pipeline, with the pool that prompt stages write into."""

    def __init__(self, options: StageOptions, spec: ModelSpec) -> None:
        super().__init__(options, spec)
        self._scheduler: TokenScheduler | None = None
        self._live: dict[str, _LiveSequence] = {}
        self._prompt_epochs: dict[str, int] = {}
        """the epoch at which each prompt pipeline last said that it is ready"""
        self._received_bytes = 0
        self._corrupt_arrivals = 0
        self._server: PoolServer | None = None
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="verify")

    # ------------------------------------------------------------ the stage's part

    async def open_pool(self) -> dict[str, str]:
        if self.options.is_colocated:
            return {}
        self._server = await PoolServer.start(self.pool, self.options.host, self.incarnation)
        return {"kv_offer": self._server.offer.encode()}

    async def close_pool(self) -> None:
        self._verifier.shutdown(wait=True, cancel_futures=True)
        if self._server is not None:
            await self._server.aclose()

    def _kv_arrived(self, arrived: KvArrived) -> None:
        """Verifies a hand-off off the event loop and confirms it to the driver."""
        if not self.accepts(arrived.epoch):
            return
        future = self._verifier.submit(verify_arrival, self.pool, arrived)
        loop = self.loop
        future.add_done_callback(
            lambda done: None if done.cancelled() else loop.call_soon_threadsafe(self._verified, arrived, done.result())
        )

    def _verified(self, arrived: KvArrived, intact: bool) -> None:
        num_layers = arrived.layers[1] - arrived.layers[0]
        self._received_bytes += self.pool.layout.bytes_per_token_layer * arrived.num_tokens * num_layers
        if not intact:
            self._corrupt_arrivals += 1
            logger.warning("corrupt KV for %s, attempt %d", arrived.sequence_id, arrived.attempt)
        confirmed = KvConfirmed(
            arrived.epoch, arrived.sequence_id, arrived.attempt, arrived.num_tokens * num_layers, intact
        )
        if self.options.is_driver:
            self.handle(Sender(self.options.name, self.incarnation), confirmed)
        elif self.record is not None:
            self.peers.send(self.record.stages[0].name, confirmed)

    # ------------------------------------------------------------ the driver's part

    def new_driver(self, epoch: int, num_blocks: int) -> None:
        self._live.clear()
        self._scheduler = TokenScheduler(
            epoch=epoch,
            num_stages=self.options.num_stages,
            num_layers=self.spec.num_layers,
            num_blocks=num_blocks,
            block_size=self.options.block_size,
            eos_token_ids=self.spec.eos_token_ids,
            chunk_tokens=self.options.chunk_tokens if self.options.is_colocated else 0,
        )

    def end_driver(self) -> None:
        self._scheduler = None
        self._live.clear()

    def next_step(self) -> Step | None:
        return None if self._scheduler is None else self._scheduler.next_step()

    def step_done(self, step: int, drawn: list[Drawn]) -> None:
        if self._scheduler is not None:
            self._carry_out(self._scheduler.step_done(step, drawn))

    def handle(self, sender: Sender, message: StageInboxMessage) -> None:
        if isinstance(message, KvArrived):
            self._kv_arrived(message)
            return
        scheduler = self._scheduler
        if scheduler is None:
            if isinstance(message, PipelineReady):
                self._prompt_epochs[message.pipeline] = message.epoch
            return
        match message:
            case PipelineReady(pipeline, epoch):
                self._prompt_epochs[pipeline] = epoch
                self._carry_out(scheduler.pipeline_replaced(pipeline, epoch))
            case Admit():
                if self.accepts(message.epoch):
                    self._admit(scheduler, sender, message)
            case CancelSequence(sequence_id):
                self._carry_out(scheduler.cancel(sequence_id))
                self._live.pop(sequence_id, None)
            case FirstToken(epoch, sequence_id, attempt, drawn):
                if self.accepts(epoch):
                    self._carry_out(scheduler.first_token(sequence_id, attempt, drawn))
            case KvConfirmed(epoch, sequence_id, attempt, num_cells, intact):
                if self.accepts(epoch):
                    self._carry_out(scheduler.kv_confirmed(sequence_id, attempt, num_cells, intact))
            case HandoffEnded():
                if self.accepts(message.epoch):
                    self._carry_out(_handoff_ended(scheduler, message))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender.name)
        self.pump()

    def member_lost(self, record: MemberRecord) -> None:
        """Nobody reads the tokens of a router that is gone: its clients ask again at its successor."""
        if record.role != "router" or self._scheduler is None:
            return
        for sequence_id, live in list(self._live.items()):
            if live.router == (record.name, record.incarnation):
                self._carry_out(self._scheduler.cancel(sequence_id))
                self._live.pop(sequence_id, None)
        self.pump()

    def _admit(self, scheduler: TokenScheduler, router: Sender, admit: Admit) -> None:
        self._live[admit.sequence_id] = _LiveSequence(admit, router)
        self._carry_out(
            scheduler.admit(
                admit.sequence_id,
                admit.choice,
                unpack_ids(admit.prompt),
                unpack_ids(admit.forced),
                admit.params,
            )
        )

    def _carry_out(self, actions: Iterable[Action]) -> None:
        produced: dict[str, list[ProducedToken]] = defaultdict(list)
        ended: list[str] = []
        for action in actions:
            live = self._live.get(action.sequence_id)
            if live is None:
                continue
            match action:
                case Produce(sequence_id, index, drawn, reason):
                    produced[live.router.name].append(ProducedToken(sequence_id, index, drawn, reason))
                    if reason is not None:
                        ended.append(sequence_id)
                case Grant():
                    self._request_prefill(live, action)
                case StopPrefill(sequence_id, attempt):
                    self._stop_prefill(sequence_id, attempt)
                case Fail(sequence_id, error):
                    failed = SequenceFailed(self.options.pipeline, self.epoch, sequence_id, error)
                    self.peers.send(live.router.name, failed)
                    ended.append(sequence_id)
                case _:
                    assert_never(action)
        for router, tokens in produced.items():
            self.peers.send(router, TokensProduced(self.options.pipeline, self.epoch, tokens))
        for sequence_id in ended:
            self._live.pop(sequence_id, None)

    def _request_prefill(self, live: _LiveSequence, grant: Grant) -> None:
        """Sends the grant and the work to the prompt pipeline the router chose, or to any other that is there."""
        admit = live.admit
        record = self.records.get(admit.prompt_pipeline) or next(
            (record for record in self.records.values() if record.role == "prompt_stage"), None
        )
        if record is None or self._scheduler is None:
            return
        # one that is being replaced has not said yet that it is ready; then it is asked again when it does
        epoch = self._prompt_epochs.get(record.pipeline, 0)
        self._scheduler.assign_writer(grant.sequence_id, record.pipeline, epoch)
        prefill = Prefill(
            epoch,
            grant.sequence_id,
            grant.attempt,
            admit.choice,
            len(admit.prompt) // 4,
            admit.prompt + pack_ids(grant.forced),
            admit.params,
            Handoff(self.options.pipeline, self.epoch, grant.blocks),
        )
        self.peers.send(record.stages[0].name, prefill)

    def _stop_prefill(self, sequence_id: str, attempt: int) -> None:
        writer = None if self._scheduler is None else self._scheduler.writer(sequence_id)
        record = None if writer is None else self.records.get(writer[0])
        if record is not None:
            self.peers.send(record.stages[0].name, CancelPrefill(sequence_id, attempt))

    # ------------------------------------------------------------ status

    def role_stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = {
            "kv_blocks": self.kv_blocks() if self._scheduler is None else self._scheduler.kv_blocks(),
            "handoff": {"received_bytes": self._received_bytes, "corrupt": self._corrupt_arrivals},
        }
        if self._scheduler is not None:
            stats["sequences"] = {
                "running": self._scheduler.num_running,
                "waiting": self._scheduler.num_waiting,
            }
        return stats


def _handoff_ended(scheduler: TokenScheduler, ended: HandoffEnded) -> list[Action]:
    if ended.error is not None:
        logger.warning("hand-off of %s failed: %s", ended.sequence_id, ended.error)
    return scheduler.handoff_ended(
        ended.sequence_id, ended.attempt, ended.stage_index, ended.num_stages, ended.error is not None
    )
