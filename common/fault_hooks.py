"""Signals that make a process fail in ways that no other process could bring about, for tests of detection.

They are there only where the environment says so when the process starts. Without them SIGUSR1 and SIGUSR2 end a
process, as they do everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

VARIABLE = "DEJAVU_FAULT_HOOKS"
STALL_S = 10.0
STUCK_LOOP = signal.SIGUSR1
STUCK_STEP = signal.SIGUSR2


def install_fault_hook(loop: asyncio.AbstractEventLoop, number: signal.Signals, fail: Callable[[], None]) -> bool:
    """From now on the signal calls `fail()` on the event loop. False, and nothing changes, unless the environment has
    DEJAVU_FAULT_HOOKS=1."""
    if os.environ.get(VARIABLE) != "1":
        return False
    loop.add_signal_handler(number, fail)
    return True


def stall() -> None:
    """The thread that calls it does nothing for ten seconds."""
    logger.warning("stalled for %g s, as asked by a fault hook", STALL_S)
    time.sleep(STALL_S)
