"""What a stage has of the process that it lives in, for the time of one role."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

from common.c_library import stop_building
from common.loop_monitor import LoopMonitor
from common.membership import PipelineRecord

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class StageProcess:
    """Runs what the stage does, until the process is to `stop`, or it is `over` with the stage's pipeline."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self.monitor = LoopMonitor()
        self.over: asyncio.Future[PipelineRecord] = self.loop.create_future()
        """the stage's pipeline's last record, once that is known"""
        self.crashed: asyncio.Future[None] = self.loop.create_future()
        self._stop = stop
        self._tasks: asyncio.TaskGroup
        self._running: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Ends the process in order."""
        self._stop.set()

    def crash(self, error: BaseException) -> None:
        """Ends it with an exception."""
        if not self.crashed.done():
            self.crashed.set_exception(error)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs while the process serves; its end does not wait for this."""
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, called in a thread. A thread cannot be interrupted, and this may take long: where the
        process is to stop meanwhile, it does not wait. Nobody counts on it yet."""
        working = asyncio.ensure_future(asyncio.to_thread(work))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            _end_at_once()
        stopped.cancel()
        return working.result()

    async def run(
        self,
        works: Iterable[Coroutine[Any, Any, None]],
        end: Callable[[PipelineRecord], Coroutine[Any, Any, None]],
    ) -> bool:
        """Runs `works` until the process is to stop (False), or until its pipeline is over and `end(record)` has
        returned (True). Raises what it has crashed with."""
        async with asyncio.TaskGroup() as self._tasks:
            for work in (*works, self.monitor.watch()):
                self.in_background(work)
            stopped = self._tasks.create_task(self._stop.wait())
            ends: list[asyncio.Future[Any]] = [stopped, self.crashed]
            await asyncio.wait([*ends, self.over], return_when=asyncio.FIRST_COMPLETED)
            if self.over.done():
                ending = self._tasks.create_task(end(self.over.result()))
                await asyncio.wait([*ends, ending], return_when=asyncio.FIRST_COMPLETED)
                ending.cancel()
            for task in (stopped, *self._running):
                task.cancel()
            if self.crashed.done():
                self.crashed.result()
            return self.over.done() and not self._stop.is_set()


def _end_at_once() -> NoReturn:
    logger.info("stopped before it was ready")
    stop_building()
    logging.shutdown()
    os._exit(0)
