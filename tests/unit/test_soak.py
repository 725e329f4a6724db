"""The soak test finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.soak import MAX_GROWTH_BYTES, MAX_MORE_FILES, _grown, _wrong_status

SIZE = {"memory_bytes": 100 << 20, "files": 20}


def status(**changes: Any) -> dict[str, Any]:
    blocks = {"total": 8, "free": 8, "quarantined": 0}
    document = {
        "services": [{"name": "a", "kv_blocks": blocks}, {"name": "router-0"}],
        "counters": {"false_failovers": 0},
        "epoch": 7,
        "events": [{"at_monotonic_s": 1.0, "kind": "detected", "service": "a"}],
    }
    return document | changes


def test_a_system_that_was_left_alone_is_fine() -> None:
    assert _wrong_status(status(), status(), 2.0) == []
    assert _grown({"a": SIZE}, {"a": SIZE, "b": SIZE}) == []


@pytest.mark.parametrize(
    "after",
    [
        status(events=[{"at_monotonic_s": 3.0, "kind": "suspected", "service": "a"}]),
        status(events=[{"at_monotonic_s": 3.0, "kind": "leader", "service": "router-1"}]),
        status(epoch=8),
        status(counters={"false_failovers": 1}),
        status(services=[{"name": "a", "kv_blocks": {"total": 8, "free": 7, "quarantined": 0}}]),
        status(services=[{"name": "a", "kv_blocks": {"total": 8, "free": 8, "quarantined": 1}}]),
    ],
)
def test_each_fault_is_found(after: dict[str, Any]) -> None:
    assert len(_wrong_status(status(), after, 2.0)) == 1


@pytest.mark.parametrize(
    "growth",
    [{"memory_bytes": SIZE["memory_bytes"] + MAX_GROWTH_BYTES + 1}, {"files": SIZE["files"] + MAX_MORE_FILES + 1}],
)
def test_growth_is_found(growth: dict[str, int]) -> None:
    assert len(_grown({"a": SIZE}, {"a": SIZE | growth})) == 1
