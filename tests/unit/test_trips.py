"""When a driver says that a step was lost between two stages that live."""

from __future__ import annotations

from common.stage.trips import Trips
from tests.unit.test_watchdog import ask


def test_nobody_knows_how_long_the_first_one_takes() -> None:
    trips = Trips(20.0)
    trips.started(0, 256, 0.0)
    assert ask(trips, 0.0, 59.0) == 0.0
    assert ask(trips, 59.1, 61.0) > 0.0
    trips.done(0, 61.0)
    assert ask(trips, 61.1, 200.0) == 0.0, "nothing is on its way"


def test_one_that_never_comes_out_is_missed() -> None:
    trips = Trips(20.0)
    trips.started(0, 1, 0.0)
    trips.done(0, 0.01)
    trips.started(1, 1, 1.0)
    assert ask(trips, 1.0, 20.9) == 0.0
    assert ask(trips, 21.0, 21.5) > 0.0


def test_the_more_tokens_the_longer_it_may_take() -> None:
    trips = Trips(20.0)
    trips.started(0, 2, 0.0)
    trips.done(0, 1.0)
    trips.started(1, 20, 1.0)
    assert ask(trips, 1.0, 50.9) == 0.0
    assert ask(trips, 51.0, 52.0) > 0.0


def test_one_that_was_overtaken_is_missed_sooner_unless_it_was_only_late() -> None:
    trips = Trips(20.0)
    for step in range(3):
        trips.started(step, 1, 0.0)
    trips.done(1, 0.5)
    assert ask(trips, 0.5, 0.9) == 0.0
    assert ask(trips, 1.0, 1.5) > 0.0
    trips.done(0, 1.5)
    assert ask(trips, 1.6, 5.0) == 0.0


def test_what_stood_still_has_missed_nothing() -> None:
    trips = Trips(20.0)
    trips.started(0, 1, 0.0)
    trips.done(0, 0.01)
    trips.started(1, 1, 1.0)
    ask(trips, 1.0, 2.0)
    assert ask(trips, 30.0, 48.9) == 0.0
    assert ask(trips, 49.0, 50.0) > 0.0
