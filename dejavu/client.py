"""The asynchronous client."""

from __future__ import annotations

import operator
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence, Set
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import msgspec

from dejavu.endpoints import find_endpoints
from dejavu.errors import InvalidParameter, PromptEmpty, PromptTooLong, ProtocolError, TokenOutOfRange
from dejavu.live_request import LiveRequest
from dejavu.params import SamplingParams
from dejavu.session import Session
from dejavu.types import Choice, Completion, Token
from dejavu.wire import MAX_PROMPT_BYTES, MAX_REQUEST_ID_CHARS, Submit

CONNECT_TIMEOUT_S = 5.0
OUTAGE_LIMIT_S = 30.0


class AsyncClient:
    """Talks to a DéjàVu system: `async with AsyncClient() as client: ...`.

    `endpoint` is one router or several (any of them; the client learns the others and finds the leader); None
    looks at `DEJAVU_ENDPOINT`, then at what a running `dejavu serve` left in `DEJAVU_STATE_DIR`, then at
    tcp://127.0.0.1:5555. When a router dies, live requests continue through another one by themselves; so they do
    when all of them died and one is started again at an address that the client knows. A request that no router
    worked on for `outage_limit_s` fails with `Unavailable`: make that longer than a start of your system takes if
    requests are to survive it.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        outage_limit_s: float = OUTAGE_LIMIT_S,
    ) -> None:
        self._session = Session(find_endpoints(endpoint), connect_timeout_s, outage_limit_s)

    async def __aenter__(self) -> Self:
        """Raises `Unavailable` if no router answers within `connect_timeout_s`, `ProtocolError` at once if all speak
        another version of the protocol."""
        await self._session.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Tokens as they come, those of all choices interleaved. Leaving the loop (or `aclose()`) cancels the
        request. `prompt` is text or token ids. Raises `InvalidRequest` at once for what can be judged here;
        while iterated: any `DejavuError`."""
        return self._session.tokens(self._prepare(prompt, params, request_id))

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> Completion:
        """The whole answer. Raises `DejavuError`; nothing partial is returned."""
        live = self._prepare(prompt, params, request_id)
        choices: list[list[Token]] = [[] for _ in range(live.num_choices)]
        async with aclosing(self._session.tokens(live)) as tokens:
            async for token in tokens:
                choices[token.choice].append(token)
        found = tuple(Choice(index, tuple(tokens)) for index, tokens in enumerate(choices))
        return Completion(live.request_id, found, live.usage)

    async def drain(self, name: str) -> None:
        """Has others take over from a service, without a failed request, and ends it. Raises `InvalidParameter` for an
        unknown name, `Unavailable` where nobody can take over."""
        await self._session.drain(_check_name(name, "name"))

    async def convert(self, pipeline: str, role: str) -> str:
        """Turns a prompt pipeline into a token pipeline (`role` "token") or back ("prompt"), without a failed request;
        returns what it is called from now on. Raises `InvalidParameter` for an unknown pipeline or role, or one that it
        has already; `Unavailable` where the others of its kind could not take over."""
        return await self._session.convert(_check_name(pipeline, "pipeline"), _check_name(role, "role"))

    async def status(self) -> dict[str, Any]:
        """What runs where, with counters and recent events. Raises `Unavailable`, `ProtocolError`."""
        try:
            return msgspec.json.decode(await self._session.status(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the status document is malformed: {error}") from error

    async def cancel(self, request_id: str) -> None:
        """Ends a live request, of this client or another; its stream raises `RequestCancelled`. An unknown id
        is no error: the request may just have ended. Raises `Unavailable` while no router is connected."""
        self._session.cancel(_check_name(request_id, "request_id"))

    async def aclose(self) -> None:
        """Cancels live requests and closes the connection. Can be called twice."""
        await self._session.aclose()

    def _prepare(
        self, prompt: str | Sequence[int], params: SamplingParams | None, request_id: str | None
    ) -> LiveRequest:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidParameter(f"must be SamplingParams, not {type(params).__name__}", field="params")
        welcome = self._session.welcome
        params.validate(None if welcome is None else welcome.vocab_size)
        checked = _check_text(prompt) if isinstance(prompt, str) else _check_ids(prompt)
        if welcome is not None and not isinstance(checked, str):
            _check_range(checked, welcome.vocab_size, welcome.max_context_tokens)
        if params.seed is None:
            # drawn here, so that a resubmission draws the same tokens
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        request_id = secrets.token_hex(16) if request_id is None else _check_name(request_id, "request_id")
        return LiveRequest(Submit(request_id, checked, params))


def _check_text(prompt: str) -> str:
    if not prompt:
        raise PromptEmpty("is empty", field="prompt")
    try:
        num_bytes = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise InvalidParameter(f"is not valid Unicode: {error.reason}", field="prompt") from error
    if num_bytes > MAX_PROMPT_BYTES:
        raise PromptTooLong(f"has {num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}", field="prompt")
    return prompt


def _check_ids(prompt: Sequence[int]) -> list[int]:
    try:
        ids = [operator.index(token_id) for token_id in prompt if not isinstance(token_id, bool)]
        num_given = len(prompt)
    except TypeError:
        ids, num_given = [], -1
    # what has no order, or is one thing, is no sequence, though it can be counted and iterated
    if len(ids) != num_given or isinstance(prompt, bytes | bytearray | Mapping | Set):
        raise InvalidParameter("must be a string or a sequence of integer token ids", field="prompt")
    if not ids:
        raise PromptEmpty("is empty", field="prompt")
    return ids


def _check_range(ids: list[int], vocab_size: int, max_context_tokens: int) -> None:
    if len(ids) > max_context_tokens:
        raise PromptTooLong(f"has {len(ids)} tokens; the context has {max_context_tokens}", field="prompt")
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < vocab_size:
            raise TokenOutOfRange(f"token id {token_id} is outside 0..{vocab_size - 1}", field="prompt")


def _check_name(name: str, field: str) -> str:
    """Of a request or a service."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_REQUEST_ID_CHARS:
        raise InvalidParameter(f"must have 1 to {MAX_REQUEST_ID_CHARS} characters", field=field)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameter(f"is not valid Unicode: {error.reason}", field=field) from error
    return name
