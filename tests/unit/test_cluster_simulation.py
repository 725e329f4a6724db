"""Processes die, stop, and lose etcd, in any order: one router leads, only it publishes, nobody healthy is replaced,
and in the end every pipeline consists of processes that live."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine

import pytest

from tests.unit.cluster_world import ROLES, ClusterWorld, Life
from tests.unit.virtual_time import run_virtually

SETTLE_LIMIT_S = 40.0
QUIET_S = 5.0


async def _settle(world: ClusterWorld, limit_s: float) -> float:
    """Returns how long it took until all was well."""
    start_s = world.now_s
    while world.unfinished():
        assert world.now_s < start_s + limit_s, world.unfinished()
        await asyncio.sleep(0.01)
    return world.now_s - start_s


def _injure(world: ClusterWorld, victim: Life, fault: str) -> None:
    match fault:
        case "kill":
            world.kill(victim)
        case "stop":
            world.stop(victim, world.draws.uniform(0.1, 10.0))
        case "cut off":
            world.cut_off(victim, world.draws.uniform(0.5, 8.0))
        case "outage":
            world.etcd_outage(world.draws.uniform(0.5, 8.0), was_stopped=world.draws.random() < 0.5)


async def _begin(world: ClusterWorld) -> None:
    expiry = asyncio.create_task(world.etcd.expire())
    world.background = expiry
    for role in ROLES:
        world.start(role)
    await _settle(world, SETTLE_LIMIT_S)


async def _simulate(world: ClusterWorld) -> None:
    await _begin(world)
    for _ in range(world.draws.randrange(1, 5)):
        fault = world.draws.choice(["kill", "kill", "stop", "stop", "cut off", "outage"])
        living = [life for life in world.lives.values() if not life.process.is_dead]
        leading = [life for life in living if life.cluster is not None and life.cluster.is_leader]
        _injure(world, world.draws.choice(leading if leading and world.draws.random() < 0.4 else living), fault)
        await asyncio.sleep(world.draws.choice([0.0, 0.05, 0.5, 3.0, 6.0]))
    await asyncio.sleep(10.0)  # the longest fault
    await _settle(world, SETTLE_LIMIT_S)
    num_published = len(world.published)
    await asyncio.sleep(QUIET_S)
    assert len(world.published) == num_published, "it never comes to rest"
    assert world.unfinished() == []


def _run(seed: int, act: Callable[[ClusterWorld], Coroutine[None, None, None]], *, may_kill: bool) -> ClusterWorld:
    random.seed(seed)  # for the pauses between attempts
    worlds: list[ClusterWorld] = []

    async def main() -> None:
        worlds.append(ClusterWorld(seed, may_kill=may_kill))
        await act(worlds[0])
        assert worlds[0].violations == [], worlds[0].violations

    run_virtually(main())
    return worlds[0]


def simulate(seed: int) -> ClusterWorld:
    """One run; raises `AssertionError` where something that must not be has come to pass. In every other one nobody is
    killed by routers, so that those that were stopped wake up again."""
    return _run(seed, _simulate, may_kill=bool(seed % 2))


@pytest.mark.seeds(25)
def test_only_the_leader_decides_and_all_ends_well(seed: int) -> None:
    simulate(seed)


@pytest.mark.seeds(10)
def test_who_stands_by_is_published_at_once(seed: int) -> None:
    replace_in_time(seed)


def replace_in_time(seed: int) -> None:
    """A stage dies, another stops: what stands by takes their places before anything could be started again."""

    async def act(world: ClusterWorld) -> None:
        await _begin(world)
        for name, fault, limit_s in (("token-0-0", "kill", 0.75), ("token-0-1", "stop", 1.4)):
            num_published = len(world.published)
            victim = world.lives[name]
            if fault == "kill":
                world.kill(victim)
            else:
                world.stop(victim, 10.0)
            await asyncio.sleep(limit_s)
            assert len(world.published) > num_published, f"{fault}: nobody was published within {limit_s:g} s"
            await asyncio.sleep(15.0)
            await _settle(world, SETTLE_LIMIT_S)

    _run(seed, act, may_kill=True)


@pytest.mark.seeds(5)
def test_while_etcd_is_away_one_suspect_does_not_keep_the_others_waiting(seed: int) -> None:
    """Both are killed: their lives end in their parent's sight, whoever can be told of it."""

    async def act(world: ClusterWorld) -> None:
        await _begin(world)
        await asyncio.sleep(5.0)
        victims = [world.lives[name] for name in ("token-0-0", "prompt-0-1", "store-0")]
        world.etcd_outage(8.0, was_stopped=True)
        for victim in victims:
            world.stop(victim, 20.0)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.7)
        assert all(victim.process.is_dead for victim in victims)

    _run(seed, act, may_kill=True)


@pytest.mark.seeds(5)
def test_a_leader_that_slept_and_cannot_know_that_it_was_replaced_judges_nobody(seed: int) -> None:
    wake_up_replaced(seed)


@pytest.mark.parametrize("seed", [5, 7])
def test_a_leader_that_comes_back_while_it_is_about_to_judge_judges_nobody(seed: int) -> None:
    """It asks, as the one that slept, whether it is seen, and hears that it is: as the one that has just come back."""
    wake_up_replaced(seed)


def wake_up_replaced(seed: int) -> None:
    """Nobody speaks to a leader any more, and its lease has lapsed only for the others."""

    async def act(world: ClusterWorld) -> None:
        await _begin(world)
        (leader,) = [life for life in world.lives.values() if life.cluster is not None and life.cluster.is_leader]
        world.cut_off(leader, 2.9)
        world.stop(leader, world.draws.uniform(0.6, 1.0))
        await asyncio.sleep(15.0)
        await _settle(world, SETTLE_LIMIT_S)

    _run(seed, act, may_kill=False)


@pytest.mark.seeds(5)
def test_a_leader_that_slept_publishes_nothing(seed: int) -> None:
    wake_up_deposed(seed)


def wake_up_deposed(seed: int) -> None:
    """A stage dies as a leader wakes up: it may hear of that before it hears that another one leads."""

    async def act(world: ClusterWorld) -> None:
        await _begin(world)
        (leader,) = [life for life in world.lives.values() if life.cluster is not None and life.cluster.is_leader]
        duration_s = world.draws.uniform(0.5, 1.5)
        world.stop(leader, duration_s)
        await asyncio.sleep(duration_s + world.draws.uniform(-0.02, 0.2))
        world.kill(world.lives["token-0-0"])
        await asyncio.sleep(15.0)
        await _settle(world, SETTLE_LIMIT_S)

    _run(seed, act, may_kill=False)


def test_a_run_can_be_repeated() -> None:
    """The same seed has the same course."""
    courses = [[(at_s, record.pipeline) for at_s, record in simulate(3).published] for _ in range(2)]
    assert courses[0] == courses[1] != []
