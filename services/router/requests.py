"""The router's work on requests: admission, placement, token relay, ends. All I/O goes through `Wires`."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol

import msgspec

from common.membership import PipelineRecord
from common.messages import (
    Admit,
    CancelSequence,
    Message,
    Orphans,
    PipelineReady,
    SequenceFailed,
    TokensProduced,
    pack_ids,
)
from common.model.spec import ModelSpec
from common.replica_messages import replica_key
from common.text import TextCodec
from dejavu.errors import DejavuError, InvalidParameter, PromptTooLong, RequestConflict
from dejavu.wire import Accepted, Ended, RouterMessage, Submit, TokenFrame, Tokens, WireError
from services.router.admission import HEAD_CHARS_PER_TOKEN, check_form, check_head, check_load, check_tokens
from services.router.inheritance import Inheritance
from services.router.ledger import Choice, Delivery, Ledger, Request, TokenGap, new_request
from services.router.placement import PipelineView, place, prompt_capacity
from services.router.status import Journal

logger = logging.getLogger(__name__)

LONG_TEXT_CHARS = 4096
"""Text beyond this is tokenised off the event loop."""
MOVE_S = 2.0
"""So long sequences wait for a pipeline that has lost a stage: weights may take minutes to load."""


class Wires(Protocol):
    """How requests reach the outside."""

    def to_client(self, client: bytes, message: RouterMessage) -> None: ...

    def to_member(self, name: str, message: Message) -> bool: ...


class Requests:
    """Every live request of this router and the pipelines it can use."""

    def __init__(
        self, spec: ModelSpec, codec: TextCodec | None, wires: Wires, journal: Journal, incarnation: str
    ) -> None:
        self.ledger = Ledger()
        self.pipelines: dict[str, PipelineView] = {}
        self._spec = spec
        self._codec = codec
        self._wires = wires
        self._journal = journal
        self._incarnation = incarnation
        self._leads_since = self._follows = self._num_accepted = self._num_placed = 0
        self._unplaced: dict[str, tuple[Request, Choice]] = {}
        self._inheritance = Inheritance()

    # ------------------------------------------------------------ from clients

    def precheck(self, client: bytes, submit: Submit) -> bool:
        """Judges a request before its prompt is tokenised. True: go on with `accept`; False: it was answered (a
        refusal, or the stream of the same request joined again). Raises `DejavuError`."""
        if self._rejoin(client, submit):
            return False
        check_form(submit, self._spec, has_tokenizer=self._codec is not None)
        check_load(self.ledger.num_sequences, submit.params.n)
        return True

    def tokenise(self, submit: Submit) -> list[int]:
        """The prompt's token ids; may run off the event loop. Raises `DejavuError`."""
        if isinstance(submit.prompt, list):
            return submit.prompt
        if self._codec is None:
            raise InvalidParameter("this model has no tokenizer: send token ids", field="prompt")
        head = submit.prompt[: HEAD_CHARS_PER_TOKEN * self._spec.max_context_tokens]
        if len(head) < len(submit.prompt):
            check_head(len(self._codec.encode(head)), self._spec)
        return self._codec.encode(submit.prompt)

    def accept(self, client: bytes, submit: Submit, prompt_ids: list[int]) -> None:
        """Enters a request and places its sequences, unless it came twice while its prompt was tokenised. Raises
        `DejavuError`."""
        if self._rejoin(client, submit):
            return
        check_tokens(prompt_ids, submit.delivered, submit.params, self._spec)
        capacity = prompt_capacity(self.pipelines.values())
        if capacity is not None and len(prompt_ids) > capacity:
            message = f"prompt has {len(prompt_ids)} tokens, a prompt pipeline holds {capacity} (raise --kv-memory)"
            raise PromptTooLong(message, field="prompt")
        request = new_request(
            submit.request_id,
            client,
            prompt_ids,
            self._spec.generation.complete(submit.params, len(prompt_ids)),
            _body_hash(submit),
            self._codec,
            submit.delivered,
            self._spec.eos_token_ids,
            f"{self._incarnation}.{self._num_accepted}",
        )
        self._num_accepted += 1
        self.ledger.open(request)
        self._wires.to_client(client, Accepted(request.request_id, len(prompt_ids)))
        for choice in request.choices:
            if not choice.is_done:
                self._place(request, choice)
        if all(choice.is_done for choice in request.choices):
            self._end(request, "finished")

    def refuse(self, client: bytes, request_id: str, error: DejavuError) -> None:
        """Answers a request that was not let in."""
        self._wires.to_client(client, Ended(request_id, "failed", error=wire_error(error)))

    def cancel(self, request_id: str) -> None:
        request = self.ledger.get(request_id)
        if request is not None:
            self._end(request, "cancelled")

    def client_gone(self, client: bytes) -> None:
        """Ends what nobody waits for any more. The client is not told: if it lives, it is to ask again."""
        for request in self.ledger.of_client(client):
            logger.info("client of %s is gone", request.request_id)
            self._close(request, "cancelled")

    def _rejoin(self, client: bytes, submit: Submit) -> bool:
        """Whether this is a live request, from a client that reconnected: what it has not got is repeated. Another
        client that has waited for it hears that it is no longer its own. Raises `RequestConflict`."""
        request = self.ledger.get(submit.request_id)
        if request is None:
            return False
        if request.body_hash != _body_hash(submit):
            raise RequestConflict("another request with this id is live", field="request_id")
        if request.client != client:
            taken = RequestConflict("another client has asked for the same and goes on with it", field="request_id")
            self.refuse(request.client, request.request_id, taken)
        request.client = client
        self._wires.to_client(client, Accepted(request.request_id, len(request.prompt_ids)))
        frames: list[TokenFrame] = []
        for choice in request.choices:
            known = submit.delivered[choice.choice] if choice.choice < len(submit.delivered) else []
            frames += choice.frames_from(len(known))
        if frames:
            self._wires.to_client(client, Tokens(frames))
        return True

    # ------------------------------------------------------------ from pipelines

    def pipeline_ready(self, view: PipelineView, ready: PipelineReady) -> None:
        """A pipeline runs a (new) epoch. What was running on its older epoch starts again by the normal path,
        with the delivered tokens forced. It says so again and again, perhaps also when we know better."""
        if ready.epoch <= view.lost_epoch or (view.is_ready and ready.epoch == view.epoch):
            return
        view.is_ready, view.epoch, view.capacity_tokens = True, ready.epoch, ready.capacity_tokens
        logger.info("%s is ready: epoch %d, %d tokens", view.name, ready.epoch, ready.capacity_tokens)
        self._journal.note("ready", view.name, epoch=ready.epoch)
        for request in self.ledger:
            for choice in request.choices:
                stale = choice.pipeline == view.name and choice.epoch != view.epoch
                if not choice.is_done and (stale or choice.sequence_id in self._unplaced):
                    self._place(request, choice)

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

    def _pipeline_over(self, name: str) -> None:
        """Its sequences go on elsewhere, with the delivered tokens forced. Its prompts: token drivers see to that."""
        self.pipelines.pop(name, None)
        self._await_less([name])
        for request in self.ledger:
            for choice in request.choices:
                if choice.prompt_pipeline == name:
                    choice.prompt_pipeline = ""
                if choice.pipeline == name and not choice.is_done:
                    self._place(request, choice)

    def is_ready(self, name: str) -> bool:
        """Whether a pipeline works."""
        return name in self.pipelines and self.pipelines[name].is_ready

    def longest_tokens(self, name: str) -> int:
        """What the longest live sequence of a token pipeline may need, or that of a prompt pipeline does."""
        choices = [(request, choice) for request in self.ledger for choice in request.choices if not choice.is_done]
        tokens = [len(r.prompt_ids) + r.params.max_tokens for r, c in choices if c.pipeline == name]
        prompts = [len(r.prompt_ids) + len(c.delivered) for r, c in choices if c.prompt_pipeline == name]
        return max([*tokens, *prompts], default=0)

    def pipeline_lost(self, name: str) -> None:
        """A stage of the pipeline is gone: nothing is placed on it until its next epoch."""
        if name in self.pipelines:
            view = self.pipelines[name]
            view.is_ready, view.lost_epoch = False, view.published_epoch
            self._await_less([name])

    def move_from(self, name: str) -> None:
        """A pipeline that has lost a stage is not back: its sequences go on where there is another."""
        for request in () if self.is_ready(name) else self.ledger:
            for choice in request.choices if self._has_room(request) else ():
                if choice.pipeline == name and not choice.is_done:
                    self._place(request, choice)

    def orphans_found(self, orphans: Orphans) -> None:
        """A token pipeline has sequences of a dead router."""
        self._inheritance.reported(orphans)
        self._await_less([orphans.pipeline])

    def lead(self, since: int, follows: int = 0) -> None:
        """We lead since this etcd revision, and the router before us has led since `follows`; 0: that is not known."""
        self._leads_since, self._follows = since, follows

    def succeed(self, router: str) -> None:
        """We lead after `router`. Requests that it had begun are placed when every token pipeline has said which of
        them it has, also one of which we have heard nothing yet, or after `stop_awaiting`."""
        able = [v for v in self.pipelines.values() if v.role == "token_stage" and (v.is_ready or not v.epoch)]
        self._inheritance.await_from((view.name for view in able), router)

    def stop_awaiting(self) -> bool:
        """Whoever has not said by now what it has is waited for no longer. False: nobody could be placed anyway, the
        time has not begun."""
        if self._inheritance.awaited and not self._token_pipelines(are_ready=True):
            return False
        self._await_less(self._inheritance.awaited)
        return True

    def _token_pipelines(self, *, are_ready: bool) -> list[PipelineView]:
        views = self.pipelines.values()
        return [view for view in views if view.role == "token_stage" and view.is_ready == are_ready]

    def _has_room(self, request: Request) -> bool:
        """Whether a token pipeline that works can hold each of its sequences."""
        num_tokens = len(request.prompt_ids) + request.params.max_tokens
        return any(view.capacity_tokens >= num_tokens for view in self._token_pipelines(are_ready=True))

    def _await_less(self, pipelines: Collection[str]) -> None:
        if self._inheritance.await_less(pipelines):
            for request, choice in list(self._unplaced.values()):
                self._place(request, choice)

    def tokens_produced(self, produced: TokensProduced) -> None:
        """Relays tokens to their clients, one message a client."""
        frames: dict[bytes, list[TokenFrame]] = {}
        done: list[Request] = []
        for token in produced.tokens:
            entry = self.ledger.sequence(token.sequence_id)
            if entry is None:
                continue
            request, choice = entry
            if choice.pipeline != produced.pipeline or choice.epoch != produced.epoch:
                self._journal.counters["refused_frames"] += 1
                continue
            try:
                delivery = self.ledger.deliver(token, produced.epoch)
            except TokenGap as gap:
                self._end(request, "failed", WireError("request_failed", str(gap)))
                continue
            self._account(choice, delivery)
            if delivery.frame is not None:
                frames.setdefault(request.client, []).append(delivery.frame)
            if delivery.request_done:
                done.append(request)
        for client, batch in frames.items():
            self._wires.to_client(client, Tokens(batch))
        for request in done:
            self._end(request, "finished")

    def sequence_failed(self, failed: SequenceFailed) -> None:
        entry = self.ledger.sequence(failed.sequence_id)
        if entry is not None and entry[1].epoch == failed.epoch:
            self._end(entry[0], "failed", failed.error)

    # ------------------------------------------------------------ inside

    def _account(self, choice: Choice, delivery: Delivery) -> None:
        view = self.pipelines.get(choice.pipeline)
        if delivery.stop_sequence and view is not None:
            self._wires.to_member(view.driver, CancelSequence(choice.sequence_id))
        if delivery.frame is not None and choice.is_done:
            self._unload(choice)

    def _place(self, request: Request, choice: Choice) -> None:
        known = choice.prompt_pipeline or request.choices[0].prompt_pipeline
        self._unload(choice)
        key = replica_key(choice.sequence_id)
        home = self._inheritance.home(key)
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
        view = self.pipelines[placement.token_pipeline]
        came_from, choice.home = choice.home, view.name
        self._num_placed += 1
        choice.pipeline, choice.epoch = view.name, view.epoch
        choice.prompt_pipeline = placement.prompt_pipeline
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
                placement.prompt_pipeline,
                came_from,
                (self._leads_since, self._num_placed),
                self._follows,
            ),
        )

    def _loads(self, request: Request, choice: Choice) -> list[tuple[str, int]]:
        loads = [(choice.pipeline, request.params.max_tokens)]
        if choice.prompt_pipeline:
            loads.append((choice.prompt_pipeline, len(request.prompt_ids)))
        return loads

    def _unload(self, choice: Choice) -> None:
        entry = self.ledger.sequence(choice.sequence_id)
        if entry is None or not choice.pipeline:
            return
        for name, tokens in self._loads(entry[0], choice):
            if name in self.pipelines:
                self.pipelines[name].load_tokens -= tokens
        choice.pipeline, choice.prompt_pipeline = "", ""

    def _end(self, request: Request, outcome: str, error: WireError | None = None) -> None:
        self._close(request, outcome)
        ended = Ended(request.request_id, outcome, len(request.prompt_ids), request.num_output_tokens, error)
        self._wires.to_client(request.client, ended)

    def _close(self, request: Request, outcome: str) -> None:
        """Nobody works on it any more."""
        for choice in request.choices:
            self._unplaced.pop(choice.sequence_id, None)
            view = self.pipelines.get(choice.pipeline)
            if not choice.is_done and view is not None:
                self._wires.to_member(view.driver, CancelSequence(choice.sequence_id))
            self._unload(choice)
        self.ledger.close(request)
        self._journal.counters[f"requests_{outcome}"] += 1


def wire_error(error: DejavuError) -> WireError:
    """A typed error as it travels."""
    return msgspec.convert(error.to_wire(), WireError)


def _body_hash(submit: Submit) -> int:
    prompt = submit.prompt if isinstance(submit.prompt, str) else tuple(submit.prompt)
    return hash((prompt, msgspec.msgpack.encode(submit.params)))
