"""Who has gone silent (pure). A lease tells it after seconds; heartbeats of event loops and steps tell it sooner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.membership import MemberRecord

TICK_S = 0.03
STOPPED_AFTER_S = 0.35
"""Silence after which it is worth looking whether the process was stopped."""
SILENT_AFTER_S = 1.2
"""Silence that no load explains: the event loop is stuck, or the way to us is broken."""
MAX_OWN_DELAY_S = 0.2


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A member that must be replaced, and why."""

    record: MemberRecord
    reason: str
    is_silence: bool = False
    """whoever says so must be sure that the others speak to it"""


@dataclass(slots=True)
class _Pulse:
    incarnation: str
    heard_at_s: float
    overdue_s: float = 0.0
    has_beaten: bool = True
    """False: we know of it, and have not heard it yet"""
    run_delay_s: float | None = None
    """when it began to look silent"""


class Watchdog:
    """Listens for heartbeats. `is_stopped(record)` says whether the operating system has stopped a process (False where
    that cannot be known), `run_delay_s(record)` for how long it has been kept from running by others, since it began
    (0 where that cannot be known)."""

    def __init__(
        self, is_stopped: Callable[[MemberRecord], bool], run_delay_s: Callable[[MemberRecord], float]
    ) -> None:
        self._is_stopped = is_stopped
        self._run_delay_s = run_delay_s
        self._pulses: dict[str, _Pulse] = {}
        self._ticked_at_s: float | None = None

    def heard(self, name: str, incarnation: str, overdue_s: float, now_s: float) -> None:
        """A heartbeat; `overdue_s` > 0: its step is stuck."""
        self._pulses[name] = _Pulse(incarnation, now_s, overdue_s)

    def lost(self, name: str) -> None:
        self._pulses.pop(name, None)

    def is_well(self, record: MemberRecord) -> bool:
        """Whether this incarnation was heard since it was lost, and nothing of it was overdue."""
        pulse = self._pulses.get(record.name)
        if pulse is None or pulse.incarnation != record.incarnation:
            return False
        return pulse.has_beaten and not pulse.overdue_s

    def pause(self) -> None:
        """Nobody is judged for now: others may not know us, so they do not tell us anything. Their silence begins
        anew with the next call of `suspects`."""
        self._ticked_at_s = None

    def suspects(self, members: Iterable[MemberRecord], now_s: float) -> list[Suspicion]:
        """Call every `TICK_S`, or `pause`. Time in which this process, or the one that is judged, was kept from running
        by others does not count: a busy machine is no failure."""
        late_s = math.inf if self._ticked_at_s is None else now_s - self._ticked_at_s - TICK_S
        self._ticked_at_s = now_s
        if late_s > MAX_OWN_DELAY_S:
            for pulse in self._pulses.values():
                pulse.heard_at_s = min(now_s, pulse.heard_at_s + late_s)
            return []
        judged = [self._judge(record, now_s) for record in members]
        return [suspicion for suspicion in judged if suspicion is not None]

    def _judge(self, record: MemberRecord, now_s: float) -> Suspicion | None:
        pulse = self._pulses.get(record.name)
        if pulse is None or pulse.incarnation != record.incarnation:
            # how soon its first heartbeat finds its way to us is not certain, but it may be stopped before that
            pulse = self._pulses[record.name] = _Pulse(record.incarnation, now_s, has_beaten=False)
        silent_s = now_s - pulse.heard_at_s
        if silent_s > STOPPED_AFTER_S:
            run_delay_s = self._run_delay_s(record)
            if pulse.run_delay_s is None:
                pulse.run_delay_s = run_delay_s
            silent_s -= run_delay_s - pulse.run_delay_s
        if silent_s > STOPPED_AFTER_S and self._is_stopped(record):
            return Suspicion(record, "stopped")
        if silent_s > SILENT_AFTER_S and pulse.has_beaten:
            return Suspicion(record, f"silent for {silent_s:.2f} s", is_silence=True)
        return Suspicion(record, f"step overdue by {pulse.overdue_s:.2f} s") if pulse.overdue_s > 0 else None
