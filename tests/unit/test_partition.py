"""Who is asked to make way for those that are away, and whom a cut keeps apart."""

from __future__ import annotations

from typing import Any

from loadtest.partition import _moves


def service(name: str, role: str, state: str, stage_index: int | None = None) -> dict[str, Any]:
    pipeline = None if stage_index is None else "token-0"
    return {"name": name, "role": role, "state": state, "pipeline": pipeline, "stage_index": stage_index}


def test_who_works_in_the_place_of_one_that_is_away_is_asked_to_go() -> None:
    near = [service(f"near-{index}", "token_stage", "active", index) for index in (0, 1)]
    assert _moves(near, ["far-1"]) == [""], "it has not come yet"
    assert _moves([*near, service("far-1", "standby", "standby", 1)], ["far-1"]) == ["near-1"]
    at_work = [near[0], service("far-1", "token_stage", "active", 1)]
    assert _moves(at_work, ["far-1"]) == [""], "nobody stands by for it yet"
    assert not _moves([*at_work, service("near-1", "standby", "standby", 1)], ["far-1"])


def test_a_router_that_is_away_must_lead_and_a_store_must_only_be_there() -> None:
    routers = [service("near", "router", "leader"), service("far", "router", "active")]
    assert _moves(routers, ["far"]) == ["near"]
    assert not _moves([service("near", "router", "active"), service("far", "router", "leader")], ["far"])
    assert not _moves([service("far", "cache_store", "active"), service("near", "cache_store", "active")], ["far"])
