"""One request between submission and end: what arrived, what the user has, how it ended (no I/O)."""

from __future__ import annotations

import asyncio

import msgspec

from dejavu.errors import DejavuError, ProtocolError, RequestCancelled, RequestFailed, error_from_wire
from dejavu.types import Token, Usage
from dejavu.wire import Ended, Submit, TokenFrame


class LiveRequest:
    """Takes frames in order and hands tokens on. What waits for the user is bounded by `max_tokens` x `n`."""

    def __init__(self, submit: Submit) -> None:
        num_choices = submit.params.n
        self._submit = submit
        self._received: list[list[int]] = [[] for _ in range(num_choices)]
        self._finished = [False] * num_choices
        self._num_prompt_tokens = 0
        self._waiting: asyncio.Queue[Token | DejavuError | None] = asyncio.Queue()
        self.has_ended = False
        self.is_cancelled = False
        """The user cancelled it; it must not be submitted again."""
        self.unanswered_since_s: float | None = None
        """When it was last left without a router that works on it; None while one does."""

    @property
    def request_id(self) -> str:
        return self._submit.request_id

    @property
    def num_choices(self) -> int:
        return len(self._received)

    @property
    def is_complete(self) -> bool:
        """The last token of every choice is here."""
        return all(self._finished)

    @property
    def usage(self) -> Usage:
        return Usage(self._num_prompt_tokens, sum(map(len, self._received)))

    def submission(self) -> Submit:
        """What to send to a router that may not know the request: it continues after what is already here."""
        if not any(self._received):
            return self._submit
        return msgspec.structs.replace(self._submit, delivered=[list(ids) for ids in self._received])

    def accept(self, num_prompt_tokens: int) -> None:
        self.unanswered_since_s = None
        self._num_prompt_tokens = num_prompt_tokens

    def deliver(self, frame: TokenFrame) -> None:
        """Takes the next token, drops a repeated one. Raises `ProtocolError` if one is missing before."""
        self.unanswered_since_s = None
        if not 0 <= frame.choice < self.num_choices:
            raise ProtocolError(f"{self.request_id} has no choice {frame.choice}")
        received = self._received[frame.choice]
        if frame.index < len(received) or self._finished[frame.choice]:
            return
        if frame.index > len(received):
            raise ProtocolError(
                f"token {frame.index} of {self.request_id}/{frame.choice} came when {len(received)} was due"
            )
        if frame.index >= self._submit.params.max_tokens:
            raise ProtocolError(f"{self.request_id}/{frame.choice} got more than max_tokens")
        received.append(frame.token_id)
        self._finished[frame.choice] = frame.finish_reason is not None
        self._waiting.put_nowait(
            Token(
                frame.index,
                frame.token_id,
                frame.text,
                frame.choice,
                frame.logprob,
                frame.finish_reason,
                tuple(frame.top_logprobs),
            )
        )

    def end(self, ended: Ended) -> None:
        """The router's word that the request is over."""
        if ended.outcome == "finished":
            self._num_prompt_tokens = ended.num_prompt_tokens
            self.finish(ended.num_output_tokens)
        elif ended.outcome == "cancelled":
            self.fail(RequestCancelled(f"{self.request_id} was cancelled"))
        elif ended.error is None:
            self.fail(RequestFailed(f"{self.request_id} failed; the router gave no reason"))
        else:
            error = ended.error
            self.fail(error_from_wire(error.code, error.message, error.field, error.details))

    def finish(self, num_output_tokens: int) -> None:
        """A good end, if all tokens are here."""
        num_received = self.usage.num_output_tokens
        if not self.is_complete and num_received != num_output_tokens:
            message = f"{self.request_id} ended after {num_output_tokens} tokens; {num_received} came"
            self.fail(ProtocolError(message))
        elif not self.has_ended:
            self.has_ended = True
            self._waiting.put_nowait(None)

    def fail(self, error: DejavuError) -> None:
        """A bad end; the user still gets the tokens before it. Only the first end counts."""
        if not self.has_ended:
            self.has_ended = True
            self._waiting.put_nowait(error)

    async def take(self) -> Token | None:
        """The next token for the user; None at the end. Raises the error that ended the request."""
        item = await self._waiting.get()
        if isinstance(item, DejavuError):
            raise item
        return item
