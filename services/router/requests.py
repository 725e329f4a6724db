"""The router's work on requests: admission, token relay, ends. All I/O goes through `Wires`."""

from __future__ import annotations

import logging

import msgspec

from common.messages import SequenceFailed, TokensProduced
from common.model.spec import ModelSpec
from common.text import TextCodec
from dejavu.errors import DejavuError, InvalidParameter, PromptTooLong, RequestConflict
from dejavu.wire import Accepted, Ended, Submit, TokenFrame, Tokens, WireError
from services.router.admission import HEAD_CHARS_PER_TOKEN, check_form, check_head, check_load, check_tokens
from services.router.dispatch import Dispatch, Wires
from services.router.ledger import Choice, Delivery, Ledger, Request, TokenGap, new_request
from services.router.placement import prompt_capacity
from services.router.status import Journal

logger = logging.getLogger(__name__)

LONG_TEXT_CHARS = 4096
"""Text beyond this is tokenised off the event loop."""


class Requests:
    """Every live request of this router; `dispatch` knows which pipelines work on it."""

    def __init__(
        self, spec: ModelSpec, codec: TextCodec | None, wires: Wires, journal: Journal, incarnation: str
    ) -> None:
        self.ledger = Ledger()
        self.dispatch = Dispatch(self.ledger, wires, journal, incarnation)
        self._spec = spec
        self._codec = codec
        self._wires = wires
        self._journal = journal

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
        capacity = prompt_capacity(self.dispatch.pipelines.values())
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
            self.dispatch.new_term(),
        )
        self.ledger.open(request)
        self._wires.to_client(client, Accepted(request.request_id, len(prompt_ids)))
        for choice in request.choices:
            if not choice.is_done:
                self.dispatch.place(request, choice)
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

    def tokens_produced(self, produced: TokensProduced) -> None:
        """Relays tokens to their clients, one message a client."""
        frames: dict[bytes, list[TokenFrame]] = {}
        done: list[Request] = []
        for token in produced.tokens:
            entry = self.ledger.sequence(token.sequence_id)
            if entry is None:
                if token.finish_reason is None:  # that nobody wants it may not have been heard
                    self.dispatch.stop(produced.pipeline, token.sequence_id)
                continue
            request, choice = entry
            if choice.pipeline != produced.pipeline or choice.epoch != produced.epoch:
                self._journal.counters["refused_frames"] += 1
                continue
            try:
                delivery = self.ledger.deliver(token, produced.epoch)
            except TokenGap:
                self.dispatch.token_missing(choice)
                continue
            self._account(choice, produced.pipeline, delivery)
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

    def _account(self, choice: Choice, pipeline: str, delivery: Delivery) -> None:
        if delivery.stop_sequence:
            self.dispatch.stop(pipeline, choice.sequence_id)
        if delivery.frame is not None and choice.is_done:
            self.dispatch.unload(choice)

    def _end(self, request: Request, outcome: str, error: WireError | None = None) -> None:
        self._close(request, outcome)
        ended = Ended(request.request_id, outcome, len(request.prompt_ids), request.num_output_tokens, error)
        self._wires.to_client(request.client, ended)

    def _close(self, request: Request, outcome: str) -> None:
        """Nobody works on it any more."""
        for choice in request.choices:
            self.dispatch.release(choice)
        self.ledger.close(request)
        self._journal.counters[f"requests_{outcome}"] += 1


def wire_error(error: DejavuError) -> WireError:
    """A typed error as it travels."""
    return msgspec.convert(error.to_wire(), WireError)


def _body_hash(submit: Submit) -> int:
    prompt = submit.prompt if isinstance(submit.prompt, str) else tuple(submit.prompt)
    return hash((prompt, msgspec.msgpack.encode(submit.params)))
