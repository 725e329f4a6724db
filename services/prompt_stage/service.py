"""Wiring of a prompt stage: every layer's KV leaves for the token stages as soon as it exists."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any, assert_never

from common.kv.offer import GrantOffer
from common.kv.stream import Arrival, HandoffWriter
from common.membership import PipelineRecord
from common.messages import (
    CancelPrefill,
    Drawn,
    FirstToken,
    HandoffEnded,
    KvArrived,
    Prefill,
    StageInboxMessage,
    Step,
)
from common.model.spec import ModelSpec
from common.stage.options import StageOptions
from common.stage.service import StageService
from common.stage.worker import StageSequence, StageWorker
from services.prompt_stage.handoffs import Handoffs
from services.prompt_stage.scheduler import Action, DeliverFirst, NeverStarted, PromptScheduler

logger = logging.getLogger(__name__)


class PromptStage(StageService):
    """Layers [a, b) of a prompt pipeline; stage 0 drives it."""

    def __init__(self, options: StageOptions, spec: ModelSpec) -> None:
        super().__init__(options, spec)
        self._scheduler: PromptScheduler | None = None
        self._handoffs: Handoffs

    def new_worker(self) -> StageWorker:
        return self.make_worker(on_layer=self._handoffs.layer_done, on_close=self._handoffs.close)

    # ------------------------------------------------------------ the driver's part

    def new_driver(self, epoch: int, num_blocks: int) -> None:
        self._scheduler = PromptScheduler(
            epoch=epoch,
            num_stages=self.options.num_stages,
            num_blocks=num_blocks,
            block_size=self.options.block_size,
            chunk_tokens=self.options.chunk_tokens,
        )

    def next_step(self) -> Step | None:
        return None if self._scheduler is None else self._scheduler.next_step()

    def step_done(self, step: int, drawn: list[Drawn]) -> None:
        if self._scheduler is not None:
            self._carry_out(self._scheduler.step_done(step, drawn))

    def handle(self, sender: str, message: StageInboxMessage) -> None:
        if self._scheduler is None:
            return
        match message:
            case Prefill():
                if self.accepts(message.epoch):
                    self._scheduler.prefill(message)
            case CancelPrefill(sequence_id, attempt):
                self._carry_out(self._scheduler.cancel(sequence_id, attempt))
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, sender)
        self.pump()

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            prefill = action.prefill
            record = self.records.get(prefill.handoff.pipeline)
            if record is None:
                continue
            driver, epoch = record.stages[0].name, prefill.handoff.epoch
            match action:
                case DeliverFirst(_, drawn):
                    self.peers.send(driver, FirstToken(epoch, prefill.sequence_id, prefill.attempt, drawn))
                case NeverStarted():
                    for stage in range(self.options.num_stages):
                        self.peers.send(
                            driver,
                            HandoffEnded(
                                epoch, prefill.sequence_id, prefill.attempt, stage, self.options.num_stages
                            ),
                        )
                case _:
                    assert_never(action)
