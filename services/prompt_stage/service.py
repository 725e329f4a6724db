"""A prompt stage: every layer's KV leaves for the token stages as soon as it exists."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any

from common.handoff_messages import LetGo, LetGoAwaited
from common.kv.errors import LinkError
from common.kv.stream import HandoffSpan
from common.membership import PipelineRecord
from common.messages import SequenceOpen, StageInboxMessage, StageReady, Step
from common.model.spec import ModelSpec
from common.replica_messages import Claim, Claimed
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.repeats import Answers
from common.stage.role import Sender
from common.stage.service import StageService
from common.stage.worker import StageSequence, StageWorker
from services.prompt_stage.driver import PromptDriver
from services.prompt_stage.handoffs import Handoffs


class PromptStage(StageService):
    """Layers [a, b) of a prompt pipeline."""

    def __init__(self, options: StageOptions, spec: ModelSpec, incarnation: str, process: StageProcess) -> None:
        super().__init__(options, spec, incarnation, process)
        self._handoffs: Handoffs
        self._claims: dict[Claim, str] = {}
        """not answered yet, and by whom"""
        self._let_go = Answers[LetGo]()

    def new_driver(self, record: PipelineRecord, ready: list[StageReady]) -> PromptDriver:
        return PromptDriver(self, record, ready)

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
        await self._handoffs.start(self.engine.tiers.pool)
        return {}

    async def close_pool(self) -> None:
        await self._handoffs.aclose()

    def handle(self, sender: Sender, message: StageInboxMessage) -> bool:
        match message:
            case Claim():
                self._claims[message] = sender.name
                self._answer_claims()
            case LetGoAwaited():
                if self.accepts(message.epoch):
                    self._let_go_again(message)
            case _:
                return False
        return True

    def _answer_claims(self) -> None:
        """Whoever claims a pipeline for an epoch hears when we hand off to its stages of that epoch."""
        for claim, driver in list(self._claims.items()):
            if self._handoffs.epoch_of(claim.pipeline) >= claim.epoch:
                del self._claims[claim]
                self.peers.send(driver, Claimed(self.options.name, claim.pipeline, claim.epoch, []))

    async def quiesce(self) -> None:
        # token drivers take back the blocks that our older epochs were granted
        await self._handoffs.reset(self.epoch)
        for record in self.records.values():
            self._open_links(record)

    async def leave(self, record: PipelineRecord) -> None:
        await self._handoffs.reset(record.epoch)

    async def pipeline_published(self, record: PipelineRecord) -> None:
        if record.role == "token_stage":
            await self._handoffs.attach(record)
            self._answer_claims()
            self._open_links(record)

    def _open_links(self, record: PipelineRecord) -> None:
        if record.role == "token_stage" and record.successor is None:
            self.process.in_background(self._handoffs.open(record))

    # ------------------------------------------------------------ beside the steps

    def new_worker(self) -> StageWorker:
        """One that hands off what it computes."""
        handoffs = self._handoffs
        spans: list[HandoffSpan] = []

        def on_layer(step: Step, local_layer: int) -> None:
            nonlocal spans
            if local_layer == 0:
                spans = handoffs.spans(step, worker.sequences)
            # where too much waits, it is for a token stage that does not answer
            with self.engine.clock.excused():
                handoffs.submit(spans, local_layer)

        def on_close(sequence: StageSequence) -> None:
            drained = functools.partial(self._drained, epoch, sequence.opened)
            future = handoffs.drain(sequence.opened)
            future.add_done_callback(lambda done: self.process.loop.call_soon_threadsafe(drained, done))

        epoch, worker = self.epoch, self.engine.new_worker(on_layer, on_close)
        return worker

    def _drained(self, epoch: int, opened: SequenceOpen, done: Future[LinkError | None]) -> None:
        """Nothing reads the blocks of a closed sequence any more."""
        crash = done.exception()
        if crash is not None:
            self.process.crash(crash)
            return
        error = done.result()
        self._handoffs.ended(opened, error)
        if epoch == self.epoch:
            unconfirmed = {} if error is None else dict(error.unconfirmed)
            asked_in = 0 if opened.handoff is None else opened.handoff.epoch
            prompt = opened.sequence_id, opened.attempt, asked_in
            let_go = LetGo(epoch, *prompt, self.options.stage_index, unconfirmed)
            self._let_go.give((epoch, prompt), let_go)
            self.tell_driver(let_go)

    def _let_go_again(self, awaited: LetGoAwaited) -> None:
        """The others are told of when they have been let go."""
        for prompt in awaited.prompts:
            let_go = self._let_go.of((awaited.epoch, prompt))
            if let_go is not None:
                self.tell_driver(let_go)

    def stats(self) -> dict[str, Any]:
        return super().stats() | self._handoffs.stats()
