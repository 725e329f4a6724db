"""How responsive an event loop is: a timer that notes by how much it is late, and the CPU used between its ticks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from asyncio import events
from collections import deque
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

TICK_S = 0.01
CALLBACK_LIMIT_S = 0.02
NUM_SAMPLES = 60_000
"""ten minutes of ticks"""


_callback_max_s = 0.0


def run_measured(main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` on asyncio's own loop, slower, with the CPU of every single callback of this thread measured."""
    thread, run = threading.get_ident(), events.Handle._run

    def run_and_measure(handle: events.Handle) -> None:
        global _callback_max_s
        callback = getattr(handle, "_callback", None)
        started_s = time.thread_time()
        run(handle)
        used_s = time.thread_time() - started_s
        if threading.get_ident() == thread:
            _callback_max_s = max(_callback_max_s, used_s)
            if used_s > CALLBACK_LIMIT_S:
                logger.warning("%.0f ms of CPU in %r", 1e3 * used_s, getattr(callback, "__self__", callback))

    events.Handle._run = run_and_measure  # type: ignore[assignment, method-assign]
    asyncio.run(main)


class LoopMonitor:
    """Run `watch()` as a task of the loop; `figures()` gives milliseconds."""

    def __init__(self) -> None:
        self._lags_s: deque[float] = deque(maxlen=NUM_SAMPLES)
        self._max_cpu_s = 0.0

    async def watch(self) -> None:
        global _callback_max_s
        _callback_max_s = 0.0  # what starting cost is not what serving costs
        due = time.monotonic() + TICK_S
        cpu_s = time.thread_time()
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now, cpu_now_s = time.monotonic(), time.thread_time()
            self._lags_s.append(max(0.0, now - due))
            self._max_cpu_s = max(self._max_cpu_s, cpu_now_s - cpu_s)
            due, cpu_s = now + TICK_S, cpu_now_s

    def figures(self) -> dict[str, float]:
        """`lag_p50_ms`, `lag_p999_ms`, `lag_max_ms` of the last ten minutes and `cpu_max_ms`, the most CPU that all
        callbacks between two ticks used together (an upper bound of what a single callback used). Under `run_measured`
        also `callback_cpu_max_ms`, the most that a single callback used since `watch()` began."""
        lags = sorted(self._lags_s)
        if not lags:
            return {}
        measured = {"callback_cpu_max_ms": round(1e3 * _callback_max_s, 3)} if _callback_max_s else {}
        return measured | {
            "lag_p50_ms": round(1e3 * lags[len(lags) // 2], 3),
            "lag_p999_ms": round(1e3 * lags[min(len(lags) - 1, int(len(lags) * 0.999))], 3),
            "lag_max_ms": round(1e3 * lags[-1], 3),
            "cpu_max_ms": round(1e3 * self._max_cpu_s, 3),
        }
