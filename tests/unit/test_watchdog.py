"""Silence, stops and stuck steps on a clock of our own."""

from __future__ import annotations

from common.membership import MemberRecord
from common.stage.step_clock import StepClock
from common.stage.trips import Trips
from services.router.watchdog import SILENT_AFTER_S, STOPPED_AFTER_S, TICK_S, Watchdog

MEMBER = MemberRecord("a", "token_stage", "1-1", 1, "here", "tcp://127.0.0.1:1", "token-0", 0, 1, (0, 2), "active")


class Clock:
    """A watchdog, what the operating system says, and the time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.is_stopped = False
        self.run_delay_s = 0.0
        self.watchdog = Watchdog(lambda record: self.is_stopped, lambda record: self.run_delay_s)

    def beat(self, overdue_s: float = 0.0, incarnation: str = "1-1") -> None:
        self.watchdog.heard("a", incarnation, overdue_s, self.now_s)

    def pass_time(self, duration_s: float, starved: float = 0.0) -> list[str]:
        """Ticks; returns the reasons of the first tick that has any."""
        for _ in range(round(duration_s / TICK_S)):
            self.now_s += TICK_S
            self.run_delay_s += starved * TICK_S
            suspicions = self.watchdog.suspects([MEMBER], self.now_s)
            if suspicions:
                return [suspicion.reason for suspicion in suspicions]
        return []


def test_who_beats_is_left_alone() -> None:
    clock = Clock()
    for _ in range(50):
        clock.beat()
        assert clock.pass_time(0.1) == []


def test_silence_is_noticed_and_a_stop_sooner() -> None:
    clock = Clock()
    clock.beat()
    assert clock.pass_time(SILENT_AFTER_S - 0.1) == []
    assert clock.pass_time(0.3)[0].startswith("silent")
    clock.beat()
    clock.is_stopped = True
    assert clock.pass_time(STOPPED_AFTER_S + 0.1) == ["stopped"]


def test_who_was_stopped_before_it_was_heard() -> None:
    """Its first heartbeat may take its time, so that silence says nothing yet; the operating system does."""
    clock = Clock()
    assert clock.pass_time(10 * SILENT_AFTER_S) == []
    clock.is_stopped = True
    assert clock.pass_time(TICK_S) == ["stopped"]
    clock.is_stopped = False
    clock.beat()
    assert clock.pass_time(SILENT_AFTER_S + 0.1)[0].startswith("silent")


def test_a_starved_process_is_not_taken_for_a_stuck_one() -> None:
    clock = Clock()
    clock.beat()
    assert clock.pass_time(5.0, starved=0.9) == []
    assert clock.pass_time(2.0)[0].startswith("silent")


def test_our_own_sleep_counts_for_nobody() -> None:
    clock = Clock()
    clock.beat()
    clock.pass_time(0.2)
    clock.now_s += 30.0
    assert clock.pass_time(0.5) == []


def test_what_was_heard_before_a_pause_counts_for_nobody() -> None:
    clock = Clock()
    clock.beat()
    clock.now_s += 30.0
    assert clock.pass_time(SILENT_AFTER_S - 0.1) == [], "nobody was judged before"
    clock.watchdog.pause()
    assert clock.pass_time(SILENT_AFTER_S - 0.1) == []
    assert clock.pass_time(0.3)[0].startswith("silent")


def test_a_stuck_step_and_another_incarnation() -> None:
    clock = Clock()
    clock.beat(overdue_s=0.4)
    assert clock.pass_time(0.1)[0].startswith("step overdue")
    clock.beat(overdue_s=0.4, incarnation="2-2")
    assert clock.pass_time(3.0) == []


def ask(steps: StepClock | Trips, start_s: float, end_s: float) -> float:
    """Asks ten times a second; the last answer."""
    overdue_s = 0.0
    for tick in range(round(start_s * 10), round(end_s * 10) + 1):
        overdue_s = steps.overdue_s(tick / 10)
    return overdue_s


def test_steps_are_overdue_beyond_what_they_usually_take() -> None:
    steps = StepClock()
    steps.submitted(256, 0.0)
    assert ask(steps, 0.0, 50.0) == 0.0
    steps.done(0.5)
    steps.submitted(256, 51.0)
    assert ask(steps, 50.1, 53.0) == 0.0
    assert ask(steps, 53.1, 54.0) > 0.0
    steps.done(54.0)
    assert ask(steps, 54.1, 90.0) == 0.0
    steps.submitted(1024, 90.0)
    assert ask(steps, 90.1, 120.0) == 0.0


def test_a_process_that_stood_still_is_not_overdue() -> None:
    steps = StepClock()
    steps.submitted(1, 0.0)
    steps.done(0.1)
    steps.submitted(1, 1.0)
    ask(steps, 1.0, 1.5)
    assert ask(steps, 11.5, 12.0) == 0.0
    assert ask(steps, 12.1, 13.0) > 0.0


def test_waiting_for_others_is_no_stuck_step() -> None:
    steps = StepClock()
    steps.submitted(1, 0.0)
    steps.done(0.01)
    steps.submitted(1, 1.0)
    ask(steps, 1.0, 1.2)
    with steps.excused():
        assert ask(steps, 1.2, 9.0) == 0.0
    assert ask(steps, 9.0, 9.5) == 0.0
    assert ask(steps, 9.5, 11.0) > 0.0
