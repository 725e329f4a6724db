"""One thread computes, in the order of submission, so that the event loop never waits for a kernel."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from common.process import RunDelay

Result = TypeVar("Result")


class ComputeThread:
    """Runs functions one after the other; results come back to the event loop in the same order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_crash: Callable[[BaseException], None]) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._run_delay = RunDelay(self._executor.submit(threading.get_native_id).result())
        self._loop = loop
        self._on_crash = on_crash

    def submit(self, function: Callable[[], Result], on_result: Callable[[Result], None]) -> None:
        """Queues `function`; `on_result(value)` runs on the event loop. An exception is a bug: `on_crash` gets it."""

        def deliver(future: Future[Result]) -> None:
            error = future.exception()
            if error is not None:
                self._loop.call_soon_threadsafe(self._on_crash, error)
            else:
                self._loop.call_soon_threadsafe(on_result, future.result())

        self._executor.submit(function).add_done_callback(deliver)

    def clock_s(self) -> float:
        """A clock that stands still while the thread waits for a processor, so that it measures the work alone."""
        return time.monotonic() - self._run_delay.seconds()

    def close(self) -> None:
        """Drops what is queued and waits for what runs."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._run_delay.close()
