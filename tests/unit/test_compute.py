"""The compute thread: order, and a clock that others' use of the processors does not move."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from common.stage.compute import ComputeThread

WORK_S = 0.5


@pytest.fixture
def one_core() -> Iterator[int]:
    """The processor on which threads that are made from now on run."""
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, allowed)


async def measured(busy_s: float) -> tuple[float, float]:
    """How long work for `busy_s` on a real clock takes on the thread's own, and on the real one."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[float, float]] = loop.create_future()
    compute = ComputeThread(loop, done.set_exception)

    def work() -> tuple[float, float]:
        started_s, own_started_s = time.monotonic(), compute.clock_s()
        while time.monotonic() < started_s + busy_s:
            pass
        return compute.clock_s() - own_started_s, time.monotonic() - started_s

    compute.submit(work, done.set_result)
    own_s, real_s = await done
    await asyncio.to_thread(compute.close)
    return own_s, real_s


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not say who had to wait")
async def test_its_clock_stands_still_while_another_computes(one_core: int) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
        own_s, real_s = await measured(WORK_S)
        rival.kill()
    assert own_s < 0.8 * real_s


async def test_its_clock_goes_on_while_its_work_waits() -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[float] = loop.create_future()
    compute = ComputeThread(loop, done.set_exception)
    started_s = compute.clock_s()
    compute.submit(lambda: time.sleep(0.3), lambda _: done.set_result(compute.clock_s()))
    assert await done - started_s > 0.25
    await asyncio.to_thread(compute.close)
