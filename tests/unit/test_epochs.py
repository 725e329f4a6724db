"""A driver is there for one epoch: it is over before its stage does anything of the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from common.membership import MemberJoined, MemberLost, MemberRecord, PipelineRecord
from common.messages import Admit, StageReady, Step, encode, pack_ids
from dejavu.params import SamplingParams
from tests.unit.fleet_stages import FleetTokenStage, stage_options
from tests.unit.fleet_world import Fleet


def publish(stage: FleetTokenStage, epoch: int, of: MemberRecord) -> None:
    """A pipeline of two stages, of which `stage` is the first."""
    stages = tuple(msgspec.structs.replace(of, name=f"token-{i}", incarnation=f"i{i}") for i in (8, 9))
    stage.hear("pipelines", PipelineRecord("token-0", "token_stage", epoch, stages))


def second_stage_is_ready(stage: FleetTokenStage, epoch: int) -> None:
    stage.arrive("token-9.i9", encode(StageReady(epoch, 1, 40)))


def in_epoch_one(incarnation: str) -> tuple[FleetTokenStage, MemberRecord]:
    """A process for the first stage, which "i8" is in epoch 1; and the only store that it knows."""
    world = Fleet(0, num_token=0, num_prompt=0)
    store = world.members["store-a"]
    options = stage_options("token-0", "token-0", "token_stage", 0, [(0, 1), (1, 3)], is_standby=False)
    options = dataclasses.replace(options, is_colocated=True)
    stage = FleetTokenStage(world, options, incarnation)
    stage.hear("members", MemberJoined(store))
    publish(stage, 1, store)
    return stage, store


def driving() -> tuple[FleetTokenStage, MemberRecord]:
    stage, store = in_epoch_one("i8")
    assert stage.driver is None
    second_stage_is_ready(stage, 1)
    return stage, store


@pytest.mark.parametrize("is_over", [False, True])
def test_nothing_of_an_older_epoch_runs_while_stages_get_ready_for_the_next(is_over: bool) -> None:
    """A sequence waits for a store, which dies: now it could run, if its epoch were not over."""
    stage, store = driving()
    stage.arrive("router-0.i1", encode(Admit(1, "r/0/a.0", 0, pack_ids([1, 2, 3]), b"", SamplingParams(), "")))
    assert stage.driver is not None and not stage.flying
    if is_over:
        publish(stage, 2, store)
    stage.hear("members", MemberLost(store))
    assert bool(stage.flying) is not is_over
    second_stage_is_ready(stage, 2)
    assert stage.driver is not None and stage.driver.epoch == 1 + is_over


@pytest.mark.parametrize(("incarnation", "is_accepted"), [("i8", True), ("i80", False)])
def test_who_is_to_replace_a_dead_stage_computes_nothing_of_its_epoch(incarnation: str, is_accepted: bool) -> None:
    """The others may still take it for the one of that name, of whose KV it has none."""
    stage, _ = in_epoch_one(incarnation)
    assert stage.epoch == 1
    stage.arrive("token-9.i9", encode(Step(1, 0, [], [], [])))
    assert bool(stage.flying) is is_accepted
    assert stage._counters["refused_frames"] == (not is_accepted)


def test_what_older_drivers_have_cost_still_counts() -> None:
    stage, store = driving()
    assert stage.driver is not None
    stage.driver.scheduler.table.costs.recoveries = 2
    publish(stage, 2, store)
    assert stage._counters["recoveries"] == 2
    second_stage_is_ready(stage, 2)
    stage.driver.scheduler.table.costs.recoveries = 1
    publish(stage, 3, store)
    assert stage._counters["recoveries"] == 3


def test_a_driver_hears_of_a_death_before_the_links_to_the_dead_are_closed() -> None:
    stage, store = driving()
    counted_on: list[bool] = []

    async def store_lost(name: str) -> None:
        assert stage.driver is not None
        counted_on.append(name in stage.driver.scheduler.table.replication._stores)

    pulls: Any = stage.pulls
    pulls.store_lost = store_lost
    stage.hear("members", MemberLost(store))
    assert counted_on == [False]
