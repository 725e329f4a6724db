"""An event loop whose clock jumps to the next thing that is to happen, and processes on it that can be stopped."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

_real_sleep = asyncio.sleep


class _Selector(selectors.DefaultSelector):
    """Instead of waiting it moves the clock."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """No I/O, no threads, no waiting."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


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


async def _sleep(delay: float, result: object = None) -> object:
    await _real_sleep(delay)
    process = PROCESS.get()
    if process is not None:
        await process.turn()
    return result


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Runs it with `time.monotonic` and `asyncio.sleep` on the virtual clock."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(asyncio, "sleep", _sleep)
        runner.run(main)
