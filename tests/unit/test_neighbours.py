"""What the operating system says of real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from common.membership import MemberRecord
from common.process import has_ended, own_machine, scheduling
from services.router.neighbours import Neighbours, ProcessorWait

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells")


@contextlib.contextmanager
def _child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def _member(pid: int, machine: str | None = None) -> MemberRecord:
    where = own_machine() if machine is None else machine
    return MemberRecord("a", "token_stage", "1-1", pid, "h", "tcp://h:1", "t", 0, 1, (0, 1), "active", machine=where)


@pytest.fixture
def neighbours() -> Iterator[Neighbours]:
    with contextlib.closing(Neighbours()) as found:
        yield found


def _until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < deadline_s


def test_who_is_killed_is_seen_to_end_also_once_it_is_gone(neighbours: Neighbours) -> None:
    with _child() as child:
        member = _member(child.pid)
        neighbours.meet(member)
        assert not neighbours.is_ending(member)
        child.kill()
        _until(lambda: neighbours.is_ending(member))  # a zombie: nobody has waited for it
        child.wait()
        assert neighbours.is_ending(member)
        neighbours.part(member)
        assert not neighbours.is_ending(member)


def test_who_is_stopped_is_seen_and_can_be_killed(neighbours: Neighbours) -> None:
    with _child() as child:
        member = _member(child.pid)
        neighbours.meet(member)
        os.kill(child.pid, signal.SIGSTOP)
        _until(lambda: neighbours.is_stopped(member))
        neighbours.kill(member)
        assert child.wait() == -signal.SIGKILL
        neighbours.kill(member)  # its number may be another's by now


@pytest.mark.parametrize("machine", ["", "another:1"])
def test_a_number_of_another_machine_says_nothing(neighbours: Neighbours, machine: str) -> None:
    """Containers of one machine number their processes alike, too."""
    with _child() as child:
        member = _member(child.pid, machine)
        neighbours.meet(member)
        os.kill(child.pid, signal.SIGSTOP)
        assert os.waitpid(child.pid, os.WUNTRACED)[0] == child.pid
        assert not neighbours.is_stopped(member)
        neighbours.kill(member)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert not neighbours.is_ending(member)


async def test_a_process_has_ended_once_all_of_it_is_gone() -> None:
    with _child() as child:
        waiting = asyncio.ensure_future(has_ended(own_machine(), child.pid))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        child.kill()
        assert await waiting
    assert await has_ended(own_machine(), child.pid)  # nobody has this number
    assert not await has_ended("another:1", child.pid)
    assert not await has_ended("", child.pid)


def test_a_wait_for_a_processor_counts_before_it_is_over() -> None:
    delay = ProcessorWait()
    assert delay.seconds(b"R", 5.0, 1.0, 100.0) == 1.0
    assert delay.seconds(b"R", 5.0, 1.0, 101.5) == 2.5, "it wants to run, and has not"
    assert delay.seconds(b"R", 5.1, 2.75, 101.75) == 2.75, "the system counts it now"
    assert delay.seconds(b"R", 5.2, 2.75, 102.75) == 2.75, "it runs"
    assert delay.seconds(b"S", 5.3, 2.75, 103.0) == delay.seconds(b"S", 5.3, 2.75, 110.0) == 2.75, "it wants nothing"


def test_who_only_spins_is_not_kept_from_running(neighbours: Neighbours) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        member = _member(child.pid)
        neighbours.meet(member)
        began_s, before_s = time.monotonic(), neighbours.run_delay_s(member)
        ran_s = scheduling(child.pid)[0]
        _until(lambda: scheduling(child.pid)[0] > ran_s + 0.2)
        assert neighbours.run_delay_s(member) - before_s <= time.monotonic() - began_s - 0.2
        child.kill()
    assert neighbours.run_delay_s(member) == 0.0, "it is gone"
