"""Faults on demand, so that tests can see what happens then. Without `DEJAVU_FAULT_HOOKS=1` in the environment there
are none, and the signals do what they always do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

VARIABLE = "DEJAVU_FAULT_HOOKS"
LOOP_SIGNAL = signal.SIGUSR1
"""The event loop stands still."""
STEP_SIGNAL = signal.SIGUSR2
"""The compute thread stands still."""
STUCK_S = 10.0


def hook_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Lets `LOOP_SIGNAL` hold up the event loop."""
    if os.environ.get(VARIABLE) == "1":
        loop.add_signal_handler(LOOP_SIGNAL, _stand_still)


def hook_compute(loop: asyncio.AbstractEventLoop, submit: Callable[[Callable[[], None]], None]) -> None:
    """Lets `STEP_SIGNAL` hold up whatever `submit` hands functions to."""
    if os.environ.get(VARIABLE) == "1":
        loop.add_signal_handler(STEP_SIGNAL, submit, _stand_still)


def _stand_still() -> None:
    logger.warning("standing still for %g s: somebody asked for it", STUCK_S)
    time.sleep(STUCK_S)
