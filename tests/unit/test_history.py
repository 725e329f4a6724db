"""The checker finds each anomaly, and only it, in a history made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loadtest.history import History, Stream, check, most_recomputed_tokens

EXPECTED = [11, 12, 13, 14, 15]


def service(name: str, free: int = 8, recomputed: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "incarnation": "1",
        "kv_blocks": {"total": 8, "free": free, "quarantined": 0},
        "counters": {"recomputed_tokens": recomputed},
    }


def status(*services: dict[str, Any], events: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    return {
        "services": list(services),
        "counters": {"recomputed_tokens": sum(s["counters"]["recomputed_tokens"] for s in services)},
        "events": [{"kind": kind, "service": name, "at_monotonic_s": 5.0} for kind, name in events],
    }


def history() -> History:
    """A good one: the stage `a` was struck, one token computed again."""
    stream = Stream("s", EXPECTED, [(float(i), i, token_id) for i, token_id in enumerate(EXPECTED)], "finished")
    before = status(service("a"), service("b", recomputed=7))
    after = status(service("b", recomputed=8), events=(("detected", "a"), ("detected", "etcd"), ("restored", "etcd")))
    return History([stream], before, after, ["a"], 2.0, 4)


def drop(h: History) -> None:
    del h.streams[0].tokens[2]


def repeat(h: History) -> None:
    h.streams[0].tokens.insert(3, h.streams[0].tokens[2])


def swap(h: History) -> None:
    tokens = h.streams[0].tokens
    tokens[1], tokens[2] = tokens[2], tokens[1]


def invent(h: History) -> None:
    h.streams[0].tokens.append((9.0, 5, 99))


def change(h: History) -> None:
    h.streams[0].tokens[4] = (4.0, 4, 99)


def hang(h: History) -> None:
    h.streams[0].ended = None


def fail(h: History) -> None:
    h.streams[0].ended = "StageLost: nobody took over"


def leak(h: History) -> None:
    h.after = status(service("b", free=7, recomputed=8))


def recompute(h: History) -> None:
    h.after = status(service("b", recomputed=7 + 5))


def evict(h: History) -> None:
    h.after = status(service("b", recomputed=8), events=(("suspected", "b"),))


def overwrite(h: History) -> None:
    h.after["services"][0]["handoff"] = {"corrupt": 1, "received_bytes": 9}


def test_a_good_history_has_no_anomaly() -> None:
    assert check(history()) == []
    assert history().streams[0].longest_gap_s(3.5) == 1.0


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("lost", drop),
        ("duplicated", repeat),
        ("reordered", swap),
        ("phantom", invent),
        ("divergent", change),
        ("stuck", hang),
        ("failed", fail),
        ("leaked", leak),
        ("over-recomputed", recompute),
        ("false fail-over", evict),
        ("zombie accepted", overwrite),
    ],
)
def test_each_anomaly_is_found_alone(name: str, spoil: Callable[[History], None]) -> None:
    spoiled = history()
    spoil(spoiled)
    assert {anomaly.name for anomaly in check(spoiled)} == {name}


def test_what_one_stream_computed_again_is_of_this_fault() -> None:
    def driver(epoch: int, most: int) -> dict[str, Any]:
        return {"recovery": {"epoch": epoch, "most_recomputed_tokens": most}}

    def most(*after: dict[str, Any]) -> int:
        return most_recomputed_tokens({"services": [{}, driver(3, 5), driver(4, 2)]}, {"services": [{}, *after]})

    assert most(driver(3, 5), driver(4, 2)) == most() == 0
    assert most(driver(3, 5), driver(4, 3)) == 3
    assert most(driver(5, 1), driver(4, 2)) == 1
