"""A driver is there for one epoch: it is over before its stage does anything of the next."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from common.membership import MemberJoined, MemberLost, PipelineRecord
from common.messages import Admit, StageReady, encode, pack_ids
from dejavu.params import SamplingParams
from tests.unit.fleet_stages import FleetTokenStage, stage_options
from tests.unit.fleet_world import Fleet


@pytest.mark.parametrize("is_over", [False, True])
def test_nothing_of_an_older_epoch_runs_while_stages_get_ready_for_the_next(is_over: bool) -> None:
    """A sequence waits for a store, which dies: now it could run, if its epoch were not over."""
    world = Fleet(0, num_token=0, num_prompt=0)
    store = world.members["store-a"]
    options = dataclasses.replace(stage_options("token-0", "token-0", "token_stage"), num_stages=2, is_colocated=True)
    stage = FleetTokenStage(world, options, "i8")
    stages = tuple(msgspec.structs.replace(store, name=f"token-{i}", incarnation=f"i{i}") for i in (8, 9))
    first, second = (PipelineRecord("token-0", "token_stage", epoch, stages) for epoch in (1, 2))
    stage.hear("members", MemberJoined(store))
    stage.hear("pipelines", first)
    stage.arrive("token-9.i9", encode(StageReady(1, 1, 40)))
    stage.arrive("router-0.i1", encode(Admit(1, "r/0/a.0", 0, pack_ids([1, 2, 3]), b"", SamplingParams(), "")))
    assert stage.driver is not None and not stage.flying
    if is_over:
        stage.hear("pipelines", second)
    stage.hear("members", MemberLost(store))
    assert bool(stage.flying) is not is_over
    stage.arrive("token-9.i9", encode(StageReady(2, 1, 40)))
    assert stage.driver is not None and stage.driver.epoch == 1 + is_over
