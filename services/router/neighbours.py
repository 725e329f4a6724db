"""What the operating system says of members that run on this machine, sooner and more surely than any message.

A process that is killed is seen to end before it has ended: first it gives back its memory, and only then do its
connections close and does its parent hear of it.
"""

from __future__ import annotations

import contextlib
import os
import time

from common.membership import MemberRecord
from common.process import is_stopped, kill_process, own_machine, scheduling

_PF_EXITING = 0x4
"""`include/linux/sched.h`: on its way out, and nothing holds it back any more."""
_FLAGS = 6
"""Its place in /proc/PID/stat behind the name (proc(5) counts it as the ninth field)."""
_RUNNABLE = b"R"


class ProcessorWait:
    """For how long one process has been kept from running by others (pure). The operating system counts a wait when it
    is over; until then, who wants to run and does not get on between two looks is taken to wait."""

    def __init__(self) -> None:
        self._ran_s = -1.0
        self._got_on_at_s = 0.0

    def seconds(self, state: bytes, ran_s: float, waited_s: float, now_s: float) -> float:
        """Since it began, the present wait included as far as it was seen."""
        if state != _RUNNABLE or ran_s != self._ran_s:
            self._ran_s, self._got_on_at_s = ran_s, now_s
        return waited_s + now_s - self._got_on_at_s


class Neighbours:
    """`meet` a member when it joins and `part` when it is gone. All answers are False, or 0, for members of other
    machines, and where the system does not tell."""

    def __init__(self) -> None:
        self._machine = own_machine()
        self._met: dict[str, int] = {}
        """by incarnation: an open /proc/PID/stat. It stays that of this process, whoever gets its number later"""
        self._delays: dict[str, ProcessorWait] = {}
        """of those that were asked about"""

    def meet(self, record: MemberRecord) -> None:
        if record.incarnation in self._met or not self._machine or record.machine != self._machine:
            return
        # one that is gone by now has left its name, which etcd will say in its time
        with contextlib.suppress(OSError):
            self._met[record.incarnation] = os.open(f"/proc/{record.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def part(self, record: MemberRecord) -> None:
        self._delays.pop(record.incarnation, None)
        stat = self._met.pop(record.incarnation, None)
        if stat is not None:
            os.close(stat)

    def close(self) -> None:
        for stat in self._met.values():
            os.close(stat)
        self._met.clear()

    def is_ending(self, record: MemberRecord) -> bool:
        """Whether its process has begun to end, or is gone: it will never answer again."""
        try:
            fields = self._stat(record)
        except ProcessLookupError:
            return True
        return bool(fields) and (fields[0] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & _PF_EXITING))

    def _stat(self, record: MemberRecord) -> list[bytes]:
        """What /proc/PID/stat says behind the name, its state first; nothing of others. Raises `ProcessLookupError`."""
        stat = self._met.get(record.incarnation)
        return [] if stat is None else os.pread(stat, 1024, 0).rpartition(b")")[2].split()

    def is_stopped(self, record: MemberRecord) -> bool:
        return record.incarnation in self._met and is_stopped(record.pid)

    def run_delay_s(self, record: MemberRecord) -> float:
        """For how long it has been kept from running by others, since it began."""
        with contextlib.suppress(ProcessLookupError):
            if fields := self._stat(record):
                delay = self._delays.setdefault(record.incarnation, ProcessorWait())
                return delay.seconds(fields[0], *scheduling(record.pid), time.monotonic())
        return 0.0

    def kill(self, record: MemberRecord) -> bool:
        """SIGKILL, which works on a stopped process, too. False: it is not within reach."""
        return record.incarnation in self._met and (self.is_ending(record) or kill_process(record.pid))
