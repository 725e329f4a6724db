"""Several pipelines of each kind: one dies while another lives, requests move from one to the other, pipelines change
their roles, and who was taken for dead talks on. Every request ends once, with its tokens, and nothing stays behind."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from common.handoff_messages import (
    EndAwaited,
    FencedOff,
    FenceOff,
    HandoffEnded,
    KvArrived,
    KvConfirmed,
    LetGo,
    LetGoAwaited,
)
from common.messages import (
    Admit,
    CancelPrefill,
    CancelSequence,
    FirstToken,
    PipelineReady,
    Prefill,
    SequencesUnknown,
    StageReady,
    TokensAwaited,
    TokensProduced,
)
from common.replica_messages import Claim, Claimed, Locate, Located, Pull, Pulled, Replicate, Replicated
from common.succession import not_over
from tests.unit.fleet_links import NUM_BLOCKS
from tests.unit.fleet_stages import FleetPromptStage, FleetTokenStage, Stage
from tests.unit.fleet_world import CUTS, Fleet

NUM_REQUESTS = 14
LONG_S = 1e6
"""Longer than anybody waits before a hand-off is begun again, however often that was in vain."""


def inject(world: Fleet, fault: str) -> None:
    draws = world.draws
    match fault:
        case "token" | "prompt" | "token zombie" | "prompt zombie":
            victims = world.stages(FleetTokenStage if fault.startswith("token") else FleetPromptStage)
            if victims:
                lose_stage(world, draws.choice(victims), lives_on="zombie" in fault)
        case "epoch":
            # another stage of it has died
            stage = draws.choice([*world.stages(FleetTokenStage), *world.stages(FleetPromptStage)])
            world.broken.add(stage.options.pipeline)
            world.agenda.append(world.publish)
        case "store":
            lose_store(world)
        case "router":
            change_leader(world)
        case "retire":
            retire(world)


def lose_stage(world: Fleet, stage: Stage, *, lives_on: bool) -> None:
    options, role = stage.options, stage.options.role
    pipeline, place = options.pipeline, options.stage_index
    world.end(stage, lives_on=lives_on)  # type: ignore[arg-type]
    if any(member.state == "standby" for member in world.members.values()):
        world.agenda.append(world.publish)

    def again() -> None:
        record = world.records.get(pipeline)
        if record is not None and record.successor is not None:
            pipeline_now, role_now = options.other_pipeline, other_role(role)
        else:
            pipeline_now, role_now = pipeline, role
        world.start_stage(pipeline_now, role_now, place, is_standby=options.is_standby)
        world.agenda.append(world.publish)

    world.agenda.append(again)


def other_role(role: str) -> str:
    return "token_stage" if role == "prompt_stage" else "prompt_stage"


def lose_store(world: Fleet) -> None:
    if world.stores:
        store = world.draws.choice(world.stores)
        world.end(store)
        world.agenda.append(lambda: world.start(store.name, "cache_store"))


def change_leader(world: Fleet) -> None:
    dead = world.leader
    others = [router for router in world.routers if router is not dead]
    if others:
        world.end(dead)
        world.agenda.append(lambda: world.start(dead.name, "router"))
        world.lead(others[0], dead.name)


def retire(world: Fleet) -> None:
    """Where another pipeline of the kind works, as the router demands."""
    kinds: list[type[Stage]] = [FleetTokenStage, FleetPromptStage]
    for kind in world.draws.sample(kinds, 2):
        drivers = published_drivers(world, kind)
        able = [stage for stage in drivers if world.leader.requests.dispatch.is_ready(stage.options.pipeline)]
        if len(able) > 1:
            world.retire(world.draws.choice(able))
            return


def published_drivers(world: Fleet, kind: type[Stage]) -> list[Any]:
    """Of the pipelines that are not over."""
    drivers = {record.stages[0].incarnation for record in not_over(world.records).values()}
    return [stage for stage in world.stages(kind) if stage.incarnation in drivers]


def start_standbys(world: Fleet) -> None:
    """Of some stages."""
    for stage in [*world.stages(FleetTokenStage), *world.stages(FleetPromptStage)]:
        if world.draws.random() < 0.25:
            options = stage.options
            world.start_stage(options.pipeline, options.role, options.stage_index, is_standby=True)


def leave_retired(world: Fleet) -> None:
    """A process whose pipeline is over goes on in its other role."""
    if not world.leaving:
        return
    world.leaving.clear()
    for stage in [*world.stages(FleetTokenStage), *world.stages(FleetPromptStage)]:
        if stage.process.over.done():
            world.end(stage)
            world.broken.discard(stage.options.pipeline)
            options = stage.options
            role = other_role(options.role)
            world.start_stage(options.other_pipeline, role, options.stage_index, is_standby=options.is_standby)
            world.agenda.append(world.publish)


def run_a_timer(world: Fleet) -> None:
    """Somebody is not waited for any longer: token pipelines that do not say what they have, or the next router."""
    timers = [stage.timers.later for stage in world.stages(FleetTokenStage) if stage.timers.later]
    if world.leader.requests.dispatch._inheritance.awaited:
        world.leader.requests.dispatch.stop_awaiting()
    elif timers:
        world.draws.choice(timers).pop(0)()


def let_time_pass(world: Fleet) -> bool:
    """What waits for a clock happens; False: nothing does."""
    timers = [timer for stage in world.stages(FleetTokenStage) for timer in stage.timers.later]
    for stage in world.stages(FleetTokenStage):
        stage.timers.later.clear()
    for timer in timers:
        timer()
    awaited = world.leader.requests.dispatch._inheritance.awaited
    world.leader.requests.dispatch.stop_awaiting()
    was_cut_off = list(world.cut_off)
    for incarnation in was_cut_off:
        world.forget(incarnation)
    is_missed = was_missed(world)
    is_late = replace_overdue(world)
    return bool(timers or awaited or was_cut_off or is_missed or is_late)


def was_missed(world: Fleet) -> bool:
    """Whether anything follows, however long stages wait, but that they say that all is well."""
    before = world.num_news
    for _ in range(12):  # what is found missing is given up the next time, and what is asked for may be lost again
        world.remind(LONG_S)
    while world.num_news == before and world.happen(world.draws):
        pass
    return world.num_news > before


def replace_overdue(world: Fleet) -> bool:
    """As routers do; False: no driver misses a step."""
    stages = [*world.stages(FleetTokenStage), *world.stages(FleetPromptStage)]
    overdue = [stage for stage in stages if stage.driver is not None and stage.driver.overdue_s(1e9)]
    for stage in overdue:
        lose_stage(world, stage, lives_on=False)
    return bool(overdue)


FAULTS = [
    *["token"] * 3, *["prompt"] * 2, *["token zombie"] * 2, "prompt zombie", *["epoch"] * 2, "store",
    *["router"] * 2, *["retire"] * 2,
]  # fmt: skip


REPEATED = (
    Admit, TokensAwaited, TokensProduced, SequencesUnknown, CancelSequence, StageReady, PipelineReady, Prefill,
    CancelPrefill, FirstToken, KvArrived, KvConfirmed, HandoffEnded, EndAwaited,
    FenceOff, FencedOff, LetGo, LetGoAwaited, Pull, Pulled, Claim, Claimed, Locate, Located, Replicate, Replicated,
)  # fmt: skip
"""Whoever waits for one of these asks for it again."""


def simulate(seed: int, loss: float = 0.0, *, is_cut: bool = False) -> Fleet:
    """One run; raises `AssertionError` where something is lost, twice, wrong, stuck or leaked. `loss` is the part of
    what is `REPEATED` that goes nowhere; with `is_cut` pipelines have several uneven stages, and spares."""
    draws = random.Random(seed + 5000)
    world = Fleet(seed, num_token=draws.choice([2, 3]), num_prompt=2, cuts=CUTS if is_cut else None)
    if is_cut:
        start_standbys(world)
    if loss:
        world.loses = lambda message: isinstance(message, REPEATED) and draws.random() < loss
    to_submit = [(f"r{i}", draws.randrange(1, 60), draws.randrange(1, 40)) for i in range(NUM_REQUESTS)]
    faults = draws.sample(FAULTS, draws.randrange(9))
    for turn in range(200_000):
        if to_submit and draws.random() < 0.02:
            world.submit(*to_submit.pop())
        if faults and draws.random() < 0.004 and (len(world.leader.requests.ledger) > 2 or not to_submit):
            inject(world, faults.pop())
        if world.agenda and draws.random() < 0.02:
            world.agenda.pop(0)()
        if draws.random() < 0.003:
            run_a_timer(world)
        if loss and draws.random() < 0.01:
            world.remind(2.0)
        happened = world.happen(draws)
        if not happened and not (to_submit or faults or world.agenda) and not let_time_pass(world):
            break
        leave_retired(world)
        if turn % 8 == 0:
            world.check_blocks()
    check_end(world)
    return world


def check_end(world: Fleet) -> None:
    for name, client in world.clients.items():
        assert client.outcome == "finished", f"{name} never ended: {client.outcome}"
        assert all(len(ids) == client.params.max_tokens for ids in client.delivered)
    assert len(world.leader.requests.ledger) == 0
    assert all(view.load_tokens == 0 for view in world.leader.requests.dispatch.pipelines.values()), "load is left"
    for stage in published_drivers(world, FleetTokenStage):
        assert stage.driver is not None, f"{stage.options.name} does not work"
        scheduler = stage.driver.scheduler
        assert scheduler.table.num_running == scheduler.table.num_waiting == 0, "sequences are left"
        assert scheduler.table.allocator.num_free == NUM_BLOCKS["token_stage"], "blocks are left"
    for stage in published_drivers(world, FleetPromptStage):
        assert stage.driver is not None, f"{stage.options.name} does not work"
        assert stage.driver.scheduler.num_free == NUM_BLOCKS["prompt_stage"], "prompt blocks are left"
    for store in world.stores:
        store.shelf.sweep(1e9)
        assert store.shelf.kv_blocks()["free"] == store.shelf.kv_blocks()["total"], "replicas are left"


@pytest.mark.seeds(8)
def test_requests_move_among_pipelines(seed: int) -> None:
    simulate(seed)


@pytest.mark.seeds(8)
def test_pipelines_of_several_uneven_stages(seed: int) -> None:
    simulate(seed, is_cut=True)


def test_what_a_dead_router_gave_away_late_takes_nothing_from_its_successor() -> None:
    simulate(529)


def test_who_comes_back_does_not_count_on_copies_that_another_pipeline_has_replaced() -> None:
    simulate(862)


def test_what_a_leader_in_between_gave_to_another_pipeline_is_copied_again() -> None:
    for seed in (21, 678):
        simulate(seed, is_cut=True)


def test_a_late_publication_that_names_the_dead_does_not_cut_off_who_has_their_name() -> None:
    simulate(839, is_cut=True)


def test_a_late_copy_from_a_pipeline_that_a_sequence_has_left_replaces_nothing() -> None:
    simulate(1617)


def submit(world: Fleet, count: int, *, num_prompt: int) -> None:
    for index in range(count):
        world.submit(f"r{index}", num_prompt, 8)


def finish(world: Fleet) -> None:
    """All requests end as they should."""
    settle(world)
    check_end(world)


def test_many_requests_move() -> None:
    """The runs would say little if nobody moved, or no copy was ever of use."""
    worlds = [simulate(seed) for seed in range(1, 5)]
    assert sum(world.num_moved for world in worlds) > 3
    assert sum(world.num_restored for world in worlds) > 3


def settle(world: Fleet, *, deaf: Stage | None = None, until: Callable[[], bool] = lambda: False) -> None:
    """Until nothing can happen any more, or `until` says so; `deaf` hears of no publication."""
    held = [] if deaf is None else [world.news[deaf.incarnation, "pipelines"]]
    if deaf is not None:
        world.news[deaf.incarnation, "pipelines"] = deque()
    is_over = False
    while not (is_over or until()):
        if world.agenda:
            world.agenda.pop(0)()
        elif not world.happen(world.draws):
            is_over = deaf is not None or not let_time_pass(world)
        if deaf is not None:
            held[0].extend(world.news[deaf.incarnation, "pipelines"])
            world.news[deaf.incarnation, "pipelines"].clear()
    if deaf is not None:
        world.news[deaf.incarnation, "pipelines"] = held[0]


@pytest.mark.parametrize("seed", range(2))
def test_a_prompt_pipeline_is_asked_once_it_is_known_who_drives_it(seed: int) -> None:
    """That it is ready may be heard before the publication of that, while the one before names somebody dead."""
    world = Fleet(seed, num_token=1, num_prompt=1)
    world.renames = True
    settle(world)
    submit(world, 4, num_prompt=40)
    [token], [prompt] = world.stages(FleetTokenStage), world.stages(FleetPromptStage)
    while not prompt.flying:
        world.happen(world.draws)
    lose_stage(world, prompt, lives_on=False)
    settle(world, deaf=token)
    assert not all(client.outcome for client in world.clients.values()), "nobody was to be asked yet"
    finish(world)


@pytest.mark.parametrize("seed", range(2))
def test_a_grant_waits_for_the_first_prompt_pipeline(seed: int) -> None:
    world = Fleet(seed, num_token=1, num_prompt=0)
    submit(world, 1, num_prompt=40)
    settle(world)
    assert not world.clients["r0"].outcome
    world.start_stage("prompt-0", "prompt_stage")
    world.agenda.append(world.publish)
    finish(world)
