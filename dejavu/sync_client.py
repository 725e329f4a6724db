"""The synchronous client: an `AsyncClient` on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from dejavu.client import CONNECT_TIMEOUT_S, OUTAGE_LIMIT_S, AsyncClient
from dejavu.params import SamplingParams
from dejavu.types import Completion, Token

Result = TypeVar("Result")


class Client:
    """`AsyncClient` for programs without an event loop: the same methods, blocking. Connects when created
    (raises `Unavailable`); close it, or use it as a context manager. Threads may share it."""

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        outage_limit_s: float = OUTAGE_LIMIT_S,
    ) -> None:
        self._client = AsyncClient(endpoint, connect_timeout_s=connect_timeout_s, outage_limit_s=outage_limit_s)
        self._stop = asyncio.Event()
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._hold_loop(started)), name="dejavu-client", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        try:
            self._call(self._client.__aenter__())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> Generator[Token, None, None]:
        """See `AsyncClient.stream`; `close()` of the generator cancels the request."""
        return self._pull(self._client.stream(prompt, params, request_id))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> Completion:
        """See `AsyncClient.generate`."""
        return self._call(self._client.generate(prompt, params, request_id))

    def drain(self, name: str) -> None:
        """See `AsyncClient.drain`."""
        self._call(self._client.drain(name))

    def convert(self, pipeline: str, role: str) -> str:
        """See `AsyncClient.convert`."""
        return self._call(self._client.convert(pipeline, role))

    def status(self) -> dict[str, Any]:
        """See `AsyncClient.status`."""
        return self._call(self._client.status())

    def cancel(self, request_id: str) -> None:
        """See `AsyncClient.cancel`."""
        self._call(self._client.cancel(request_id))

    def close(self) -> None:
        """Cancels live requests, closes the connection, ends the thread. Can be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    async def _hold_loop(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        await self._client.aclose()

    def _pull(self, tokens: AsyncGenerator[Token, None]) -> Generator[Token, None, None]:
        turn = asyncio.Lock()  # after Ctrl-C the interrupted `_next` is still on its way out
        try:
            while (token := self._call(_next(tokens, turn))) is not None:
                yield token
        finally:
            # not awaited: garbage collection may close this generator in the loop's own thread
            if self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(_close(tokens, turn), self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # only tells if Ctrl-C ended the wait


async def _next(tokens: AsyncGenerator[Token, None], turn: asyncio.Lock) -> Token | None:
    async with turn:
        return await anext(tokens, None)


async def _close(tokens: AsyncGenerator[Token, None], turn: asyncio.Lock) -> None:
    async with turn:
        await tokens.aclose()
