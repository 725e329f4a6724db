"""Which pipelines live sequences are given to, and what they are asked again. All I/O goes through `Wires`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Protocol

from common.membership import PipelineRecord
from common.messages import (
    Admit,
    CancelSequence,
    Message,
    Orphans,
    PipelineReady,
    SequencesUnknown,
    TokensAwaited,
    pack_ids,
)
from common.replica_messages import replica_key
from dejavu.wire import RouterMessage
from services.router.inheritance import Inheritance
from services.router.ledger import Choice, Ledger, Request
from services.router.placement import PipelineView, place
from services.router.status import Journal

logger = logging.getLogger(__name__)

MOVE_S = 2.0
"""So long sequences wait for a pipeline that has lost a stage: weights may take minutes to load."""


class Wires(Protocol):
    """How a router reaches the outside."""

    def to_client(self, client: bytes, message: RouterMessage) -> None: ...

    def to_member(self, name: str, message: Message) -> bool: ...


class Dispatch:
    """The pipelines that this router can use, and which of them has each sequence of the `ledger`."""

    def __init__(self, ledger: Ledger, wires: Wires, journal: Journal, incarnation: str) -> None:
        self.pipelines: dict[str, PipelineView] = {}
        self._ledger = ledger
        self._wires = wires
        self._journal = journal
        self._incarnation = incarnation
        self._leads_since = self._follows = self._num_placed = self._num_terms = 0
        self._reports: dict[str, PipelineReady] = {}
        """of epochs that have not been published here yet, by pipeline"""
        self._unplaced: dict[str, tuple[Request, Choice]] = {}
        self._inheritance = Inheritance()

    # ------------------------------------------------------------ pipelines

    def reported_ready(self, ready: PipelineReady) -> None:
        """A driver reports as soon as it sees this router, which may be before this router sees the pipeline."""
        view = self.pipelines.get(ready.pipeline)
        if view is None or ready.epoch > view.published_epoch:
            self._reports[ready.pipeline] = ready
        elif ready.epoch < view.published_epoch:
            self._journal.counters["refused_frames"] += 1
        else:
            self.pipeline_ready(view, ready)

    def pipeline_ready(self, view: PipelineView, ready: PipelineReady) -> None:
        """A pipeline runs a (new) epoch. What was running on its older epoch starts again by the normal path,
        with the delivered tokens forced. It says so again and again, perhaps also when we know better."""
        if ready.epoch <= view.lost_epoch or (view.is_ready and ready.epoch == view.epoch):
            return
        view.is_ready, view.epoch, view.capacity_tokens = True, ready.epoch, ready.capacity_tokens
        logger.info("%s is ready: epoch %d, %d tokens", view.name, ready.epoch, ready.capacity_tokens)
        self._journal.note("ready", view.name, epoch=ready.epoch)
        for request, choice in self._live():
            stale = choice.pipeline == view.name and choice.epoch != view.epoch
            if stale or choice.sequence_id in self._unplaced:
                self.place(request, choice)

    def pipeline_published(self, record: PipelineRecord) -> None:
        """A pipeline has a new epoch, which nobody has reported ready yet, or is over."""
        if record.successor is not None:
            self._pipeline_over(record.pipeline)
            return
        view = self.pipelines.setdefault(record.pipeline, PipelineView(record.pipeline, record.role))
        if record.epoch > view.epoch:
            view.is_ready = False
        view.published_epoch = record.epoch
        view.driver = record.stages[0].name
        view.is_colocated = bool(record.stages[0].detail.get("colocated"))
        report = self._reports.pop(record.pipeline, None)
        if report is not None:
            self.reported_ready(report)

    def _pipeline_over(self, name: str) -> None:
        """Its sequences go on elsewhere, with the delivered tokens forced. Its prompts: token drivers see to that."""
        self.pipelines.pop(name, None)
        self._await_less([name])
        for request, choice in self._live():
            if choice.prompt_pipeline == name:
                choice.prompt_pipeline = ""
            if choice.pipeline == name:
                self.place(request, choice)

    def pipeline_lost(self, name: str) -> None:
        """A stage of the pipeline is gone: nothing is placed on it until its next epoch."""
        if name in self.pipelines:
            view = self.pipelines[name]
            view.is_ready, view.lost_epoch = False, view.published_epoch
            self._await_less([name])

    def move_from(self, name: str) -> None:
        """A pipeline that has lost a stage is not back: its sequences go on where there is another."""
        if self.is_ready(name):
            return
        for request, choice in self._live():
            if choice.pipeline == name and self._has_room(request):
                self.place(request, choice)

    def is_ready(self, name: str) -> bool:
        """Whether a pipeline works."""
        return name in self.pipelines and self.pipelines[name].is_ready

    def longest_tokens(self, name: str) -> int:
        """What the longest live sequence of a token pipeline may need, or that of a prompt pipeline does."""
        tokens = [len(r.prompt_ids) + r.params.max_tokens for r, c in self._live() if c.pipeline == name]
        prompts = [len(r.prompt_ids) + len(c.delivered) for r, c in self._live() if c.prompt_pipeline == name]
        return max([*tokens, *prompts], default=0)

    def _live(self) -> Iterator[tuple[Request, Choice]]:
        return ((request, choice) for request in self._ledger for choice in request.choices if not choice.is_done)

    def _token_pipelines(self, *, are_ready: bool) -> list[PipelineView]:
        views = self.pipelines.values()
        return [view for view in views if view.role == "token_stage" and view.is_ready == are_ready]

    def _has_room(self, request: Request) -> bool:
        """Whether a token pipeline that works can hold each of its sequences."""
        num_tokens = len(request.prompt_ids) + request.params.max_tokens
        return any(view.capacity_tokens >= num_tokens for view in self._token_pipelines(are_ready=True))

    # ------------------------------------------------------------ after another router

    def lead(self, since: int, follows: int = 0) -> None:
        """We lead since this etcd revision, and the router before us has led since `follows`; 0: that is not known."""
        self._leads_since, self._follows = since, follows

    def succeed(self, router: str) -> None:
        """We lead after `router`. Requests that it had begun are placed when every token pipeline has said which of
        them it has, also one of which we have heard nothing yet, or after `stop_awaiting`."""
        able = [v for v in self.pipelines.values() if v.role == "token_stage" and (v.is_ready or not v.epoch)]
        self._inheritance.await_from((view.name for view in able), router)

    def orphans_found(self, orphans: Orphans) -> None:
        """A token pipeline has sequences of a dead router."""
        self._inheritance.reported(orphans)
        self._await_less([orphans.pipeline])

    def stop_awaiting(self) -> bool:
        """Whoever has not said by now what it has is waited for no longer. False: nobody could be placed anyway, the
        time has not begun."""
        if self._inheritance.awaited and not self._token_pipelines(are_ready=True):
            return False
        self._await_less(self._inheritance.awaited)
        return True

    def _await_less(self, pipelines: Collection[str]) -> None:
        if self._inheritance.await_less(pipelines):
            for request, choice in list(self._unplaced.values()):
                self.place(request, choice)

    # ------------------------------------------------------------ sequences

    def new_term(self) -> str:
        """What makes a sequence differ from those that were ever given away for the same request, here or by a former
        router."""
        self._num_terms += 1
        return f"{self._incarnation}.{self._num_terms}"

    def place(self, request: Request, choice: Choice, home: str = "") -> None:
        """Gives a sequence to the pipelines that suit it, to `home` if it can, now or as soon as there are some."""
        known = choice.prompt_pipeline or request.choices[0].prompt_pipeline
        self.unload(choice)
        key = replica_key(choice.sequence_id)
        home = home or self._inheritance.home(key)
        may_live = bool(choice.delivered and self._inheritance.awaited) and not home
        num_tokens = len(request.prompt_ids) + request.params.max_tokens
        num_known = len(request.prompt_ids) + len(choice.delivered)
        placement = place(self.pipelines.values(), num_known, home, known, num_tokens)
        is_too_long = bool(choice.delivered) and not self._has_room(request) and self._token_pipelines(are_ready=False)
        if placement is None or may_live or is_too_long:
            self._unplaced[choice.sequence_id] = (request, choice)
            return
        self._unplaced.pop(choice.sequence_id, None)
        self._inheritance.placed(key)
        self._give(request, choice, self.pipelines[placement.token_pipeline], placement.prompt_pipeline)

    def _give(self, request: Request, choice: Choice, view: PipelineView, prompt_pipeline: str) -> None:
        choice.came_from, choice.home = choice.home, view.name
        self._num_placed += 1
        choice.pipeline, choice.epoch, choice.prompt_pipeline = view.name, view.epoch, prompt_pipeline
        choice.num_awaited = None
        for name, tokens in self._loads(request, choice):
            self.pipelines[name].load_tokens += tokens
        self._wires.to_member(
            view.driver,
            Admit(
                view.epoch,
                choice.sequence_id,
                choice.choice,
                pack_ids(request.prompt_ids),
                pack_ids(choice.delivered),
                request.params,
                prompt_pipeline,
                choice.came_from,
                (self._leads_since, self._num_placed),
                self._follows,
            ),
        )

    def release(self, choice: Choice) -> None:
        """Nobody is to work on it any more."""
        self._unplaced.pop(choice.sequence_id, None)
        if not choice.is_done:
            self.stop(choice.pipeline, choice.sequence_id)
        self.unload(choice)

    def stop(self, pipeline: str, sequence_id: str) -> None:
        """Tells a pipeline that nobody wants the tokens of a sequence of ours any more."""
        view = self.pipelines.get(pipeline)
        if view is not None and is_of(sequence_id, self._incarnation):
            self._wires.to_member(view.driver, CancelSequence(sequence_id))

    def unload(self, choice: Choice) -> None:
        """Its pipelines have nothing to do for it any more."""
        entry = self._ledger.sequence(choice.sequence_id)
        if entry is None or not choice.pipeline:
            return
        for name, tokens in self._loads(entry[0], choice):
            if name in self.pipelines:
                self.pipelines[name].load_tokens -= tokens
        choice.pipeline, choice.prompt_pipeline = "", ""

    def _loads(self, request: Request, choice: Choice) -> list[tuple[str, int]]:
        loads = [(choice.pipeline, request.params.max_tokens)]
        if choice.prompt_pipeline:
            loads.append((choice.prompt_pipeline, len(request.prompt_ids)))
        return loads

    # ------------------------------------------------------------ what may be lost on the way

    def ask_again(self) -> None:
        """Every `REPEAT_S`: about sequences that have not got on since the last time."""
        quiet: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for _, choice in self._live():
            if self.is_ready(choice.pipeline):
                num_delivered = len(choice.delivered)
                if choice.num_awaited == num_delivered:
                    quiet[choice.pipeline].append((choice.sequence_id, num_delivered))
                choice.num_awaited = num_delivered
        for pipeline, sequences in quiet.items():
            self._ask(pipeline, sequences)

    def token_missing(self, choice: Choice) -> None:
        """A later token has come: what was lost is asked for at once, and then from time to time."""
        num_delivered = len(choice.delivered)
        if choice.num_awaited != num_delivered:
            choice.num_awaited = num_delivered
            self._ask(choice.pipeline, [(choice.sequence_id, num_delivered)])

    def _ask(self, pipeline: str, sequences: list[tuple[str, int]]) -> None:
        view = self.pipelines[pipeline]
        self._wires.to_member(view.driver, TokensAwaited(view.epoch, sequences))

    def sequences_unknown(self, unknown: SequencesUnknown) -> None:
        """That they were admitted there, or their end, was lost on the way. They are admitted again under another name:
        what the pipeline has of them is taken up, as after a router's death."""
        for sequence_id in unknown.sequence_ids:
            request, choice = self._ledger.sequence(sequence_id) or (None, None)
            if request is None or choice is None or choice.is_done:
                continue
            if (choice.pipeline, choice.epoch) == (unknown.pipeline, unknown.epoch):
                logger.info("%s has lost sight of %s: it is admitted again", unknown.pipeline, sequence_id)
                choice.home = choice.came_from  # perhaps it has never been there
                self.unload(choice)
                self._ledger.rename(choice, self.new_term())
                self.place(request, choice, home=unknown.pipeline)


def is_of(sequence_id: str, incarnation: str) -> bool:
    """Whether a router of this incarnation has named the sequence."""
    return sequence_id.rpartition("/")[2].startswith(f"{incarnation}.")
