"""The ledger: every live request, its prompt, its delivered tokens, and how it ends (pure, no I/O).

A request ends exactly once: finished, failed or cancelled. Tokens are delivered in order, each index once; what
arrives twice is dropped, what arrives from an older epoch is refused and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from common.ends import finish_reason
from common.messages import ProducedToken
from common.replica_messages import replica_key
from common.text import TextCodec, TextStream
from dejavu.params import SamplingParams
from dejavu.wire import TokenFrame


@dataclass(slots=True)
class Choice:
    """One sequence of a request. `epoch` is that of the token pipeline it was admitted to."""

    sequence_id: str
    choice: int
    text: TextStream | None
    pipeline: str = ""
    prompt_pipeline: str = ""
    epoch: int = 0
    home: str = ""
    """the token pipeline that it was last given to"""
    came_from: str = ""
    """the one before"""
    delivered: list[int] = field(default_factory=list)
    frames: list[TokenFrame] = field(default_factory=list)
    """what was sent since this router knows the request; kept for a client that comes back"""
    is_done: bool = False
    num_awaited: int | None = None
    """so many tokens it had when its pipeline was last looked after; None: not since it was given to it"""

    def frames_from(self, index: int) -> list[TokenFrame]:
        """The kept frames of tokens `index` and later."""
        return [frame for frame in self.frames if frame.index >= index]


@dataclass(slots=True)
class Request:
    """`client` is the routing id that gets its frames; `body_hash` tells a repeated id from a reused one."""

    request_id: str
    client: bytes
    prompt_ids: list[int]
    params: SamplingParams
    body_hash: int
    choices: list[Choice]

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.delivered) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one produced token means: a frame for the client (None: a repetition), whether the driver must be
    told to stop (a stop string was completed, now or before), whether the request is complete."""

    frame: TokenFrame | None
    stop_sequence: bool = False
    request_done: bool = False


class TokenGap(Exception):
    """A token is missing before this one: it was lost on the way."""


class Ledger:
    """Live requests by id, sequences by sequence id."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._sequences: dict[str, tuple[Request, Choice]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def sequence(self, sequence_id: str) -> tuple[Request, Choice] | None:
        """The request and the choice of a live sequence."""
        return self._sequences.get(sequence_id)

    def open(self, request: Request) -> None:
        """Enters a new request. Raises `KeyError` if its id is live."""
        if request.request_id in self._requests:
            raise KeyError(request.request_id)
        self._requests[request.request_id] = request
        for choice in request.choices:
            self._sequences[choice.sequence_id] = (request, choice)

    def close(self, request: Request) -> None:
        """Forgets a request: it has ended."""
        del self._requests[request.request_id]
        for choice in request.choices:
            del self._sequences[choice.sequence_id]

    def rename(self, choice: Choice, term: str) -> None:
        """Its sequence differs from what it was."""
        entry = self._sequences.pop(choice.sequence_id)
        choice.sequence_id = f"{replica_key(choice.sequence_id)}/{term}"
        self._sequences[choice.sequence_id] = entry

    def of_client(self, client: bytes) -> list[Request]:
        return [request for request in self._requests.values() if request.client == client]

    def deliver(self, token: ProducedToken, epoch: int) -> Delivery:
        """Accounts for a token of a live sequence. Raises `TokenGap`."""
        request, choice = self._sequences[token.sequence_id]
        if choice.is_done:
            return Delivery(None, stop_sequence=token.finish_reason is None)
        if token.index < len(choice.delivered):
            return Delivery(None)
        if token.index > len(choice.delivered):
            raise TokenGap(f"token {token.index} of {token.sequence_id} came after {len(choice.delivered)}")
        choice.delivered.append(token.drawn.token_id)
        text, reason, stopped = _text_of(choice, token)
        choice.is_done = reason is not None
        frame = TokenFrame(
            request.request_id,
            choice.choice,
            epoch,
            token.index,
            token.drawn.token_id,
            text,
            reason,
            token.drawn.logprob,
            token.drawn.top_logprobs,
        )
        choice.frames.append(frame)
        return Delivery(frame, stopped and token.finish_reason is None, all(c.is_done for c in request.choices))


def _text_of(choice: Choice, token: ProducedToken) -> tuple[str, str | None, bool]:
    """(text, finish_reason, completed a stop string) of a choice's next token."""
    if choice.text is None:
        return "", token.finish_reason, False
    delta = choice.text.push(token.drawn.token_id)
    if delta.stopped:
        return delta.text, "stop", True
    if token.finish_reason is not None:
        return delta.text + choice.text.finish(), token.finish_reason, False
    return delta.text, None, False


def new_request(
    request_id: str,
    client: bytes,
    prompt_ids: list[int],
    params: SamplingParams,
    body_hash: int,
    codec: TextCodec | None,
    delivered: list[list[int]],
    eos_token_ids: tuple[int, ...],
    term: str,
) -> Request:
    """A request with one choice per `params.n`; `delivered` ids are replayed through the text streams. `term` makes
    its sequences differ from those of an earlier request with the same id, here or at a former router."""
    # delivered, but without text
    silent_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    choices = []
    for index in range(params.n):
        text = None if codec is None else TextStream(codec, params.stop, silent_ids)
        choice = Choice(f"{request_id}/{index}/{term}", index, text)
        for token_id in delivered[index] if index < len(delivered) else []:
            choice.delivered.append(token_id)
            stopped = text is not None and text.push(token_id).stopped
            reason = finish_reason(params, eos_token_ids, token_id, len(choice.delivered))
            choice.is_done = choice.is_done or stopped or reason is not None
        choices.append(choice)
    return Request(request_id, client, prompt_ids, params, body_hash, choices)
