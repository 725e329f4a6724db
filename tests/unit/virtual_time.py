"""An event loop whose clock jumps to the next thing that is to happen, and processes on it that can be stopped."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest

_real_sleep = asyncio.sleep


class _Handle:
    """Something that is to happen; as much of `asyncio.Handle` as is asked for."""

    __slots__ = ("_arguments", "_context", "_happen", "_is_cancelled")

    def __init__(self, happen: Callable[..., object], arguments: tuple[Any, ...], context: Context | None) -> None:
        self._happen = happen
        self._arguments = arguments
        self._context = copy_context() if context is None else context
        self._is_cancelled = False

    def cancel(self) -> None:
        self._is_cancelled = True

    def cancelled(self) -> bool:
        return self._is_cancelled

    def run(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._is_cancelled:
            return
        try:
            self._context.run(self._happen, *self._arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as an event loop does
            loop.call_exception_handler({"message": f"in {self._happen}", "exception": error})


class VirtualLoop(asyncio.BaseEventLoop):
    """No I/O, no threads, no waiting: where nothing is ready the clock moves. Of what is to happen at the same time the
    first that was asked for comes first."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 1000.0
        self._soon: deque[_Handle] = deque()
        self._later: list[tuple[float, int, _Handle]] = []
        self._num_later = 0

    def time(self) -> float:
        return self._now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        handle = _Handle(callback, args, context)
        self._soon.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        handle = _Handle(callback, args, context)
        self._num_later += 1
        heapq.heappush(self._later, (when, self._num_later, handle))
        return handle

    async def sleep(self, delay: float, result: object = None) -> object:
        """What `asyncio.sleep` does, for a process that may be stopped meanwhile."""
        if delay > 0:
            over = self.create_future()
            handle = self.call_at(self._now_s + delay, _end, over)
            try:
                await over
            except asyncio.CancelledError:
                handle.cancel()
                raise
        else:
            await _real_sleep(0)
        process = PROCESS.get()
        if process is not None and process.is_stopped:
            await process.turn()
        return result

    def _run_once(self) -> None:
        """Called by `run_forever` again and again."""
        soon, later = self._soon, self._later
        while later and later[0][2].cancelled():
            heapq.heappop(later)
        if not soon and not self._stopping:  # type: ignore[attr-defined]
            if not later:
                raise RuntimeError("nothing will ever happen again")
            self._now_s = max(self._now_s, later[0][0])
        while later and later[0][0] <= self._now_s:
            soon.append(heapq.heappop(later)[2])
        for _ in range(len(soon)):
            soon.popleft().run(self)


def _end(over: asyncio.Future[None]) -> None:
    if not over.cancelled():
        over.set_result(None)


class Process:
    """Tasks that stop and die together. `PROCESS` says whose task is running."""

    def __init__(self, name: str, incarnation: str, pid: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.pid = pid
        self.is_dead = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs = asyncio.Event()
        self._runs.set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        token = PROCESS.set(self)
        task = asyncio.create_task(work, name=self.name)
        PROCESS.reset(token)
        self._tasks.add(task)
        return task

    @property
    def is_stopped(self) -> bool:
        return not self._runs.is_set()

    def stop(self) -> None:
        self._runs.clear()

    def go_on(self) -> None:
        self._runs.set()

    def kill(self) -> None:
        """Nothing that it was about to do happens any more."""
        self.is_dead = True
        for task in self._tasks:
            task.cancel()

    async def turn(self) -> None:
        """Returns when the process may run."""
        while not self._runs.is_set():
            await self._runs.wait()


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Runs it with `time.monotonic` and `asyncio.sleep` on the virtual clock."""
    loop = VirtualLoop()
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=lambda: loop) as runner:
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(asyncio, "sleep", loop.sleep)
        runner.run(main)
