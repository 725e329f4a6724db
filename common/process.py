"""Processes as the operating system has them: what this one asks for (to die with its parent, to stay on some cores),
what can be seen of others, and names that tell them apart for ever, as their numbers do not."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

INCARNATION_VARIABLE = "DEJAVU_INCARNATION"
"""How a parent names the incarnation that it starts, so that it can say later which one has ended."""

PARENT_VARIABLE = "DEJAVU_PARENT"
"""How a parent gives its pid to its child, which may get to look only when the parent has died."""


def new_incarnation() -> str:
    """A name that no other process has, now or later."""
    return f"{os.getpid():x}-{time.time_ns():x}"


def own_incarnation() -> str:
    """This process's incarnation: the one its parent gave it, else a new one."""
    return os.environ.get(INCARNATION_VARIABLE) or new_incarnation()


def later_incarnation(incarnation: str, count: int) -> str:
    """What the same process is called once it has begun anew `count` times."""
    return f"{incarnation}-{count}" if count else incarnation


def is_of_process(incarnation: str, first: str) -> bool:
    """Whether `incarnation` is that of the process which began as `first`."""
    return incarnation == first or incarnation.startswith(f"{first}-")


def die_with_parent() -> None:
    """This process is killed when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.pop(PARENT_VARIABLE, "0")) or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died already
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_affinity(cores: Sequence[int]) -> None:
    """Keeps this process on `cores`, as far as the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, a debugger); False where that cannot be known."""
    try:
        # the name before it may contain anything, also spaces and brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def own_machine() -> str:
    """Names the machine, and on it the container, within which process numbers mean what they mean here; "" where that
    cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino:x}"
    except OSError:
        return ""


async def has_ended(machine: str, pid: int) -> bool:
    """Returns True once a process that is said to run, or to have run, on `machine` runs no more, with all its threads;
    False, at once, where that cannot be known."""
    if not machine or machine != own_machine():
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
        os.close(process)
    return True


class RunDelay:
    """For how long a thread of this process has wanted a processor and had none. One question takes a microsecond."""

    def __init__(self, thread_id: int) -> None:
        self._statistics: int | None = None
        with contextlib.suppress(OSError):
            self._statistics = os.open(f"/proc/self/task/{thread_id}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> float:
        """Since the thread began; 0 where that cannot be known. A wait counts once it is over."""
        if self._statistics is None:
            return 0.0
        return int(os.pread(self._statistics, 64, 0).split()[1]) / 1e9

    def close(self) -> None:
        """Nothing is asked afterwards."""
        if self._statistics is not None:
            os.close(self._statistics)
            self._statistics = None


def scheduling(pid: int) -> tuple[float, float]:
    """For how long the main thread of a process of this machine has run since it began, and has wanted a processor and
    had none, in seconds; the latter counts once it is over. 0 where that cannot be known."""
    try:
        ran_ns, waited_ns = Path(f"/proc/{pid}/schedstat").read_text().split()[:2]
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran_ns) / 1e9, int(waited_ns) / 1e9


def kill_process(pid: int) -> bool:
    """SIGKILL; works on a stopped process, too. False: there is none, or it is not ours."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True
