"""Who was taken for dead is told to be gone as soon as etcd allows, once, and unless it has come back before."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from common.membership import MemberEvent, MemberLost, MemberRecord, Membership
from services.router.evictions import Evictions
from tests.unit.simulated_etcd import SimulatedClient, SimulatedEtcd
from tests.unit.virtual_time import Process, run_virtually

CLUSTER = "c"
VICTIM = MemberRecord("store", "cache_store", "7-1", 7, "elsewhere", "tcp://h:7", None, None, None, None, "active")


class World:
    """A router's membership, evictions, and what the watch of members has told."""

    def __init__(self, etcd: SimulatedEtcd, membership: Membership) -> None:
        self.etcd = etcd
        self.membership = membership
        self.evictions = Evictions(membership)
        self.told: list[MemberEvent] = []

    async def watch(self) -> None:
        async for event in self.membership.watch():
            self.told.append(event)

    def num_losses(self) -> int:
        return sum(isinstance(event, MemberLost) for event in self.told)


def in_world(act: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        etcd = SimulatedEtcd(random.Random(0), lambda process, operations: None)
        here, there = Process("router", "1-1", 1), Process("store", "7-1", 7)
        async with (
            Membership(SimulatedClient(etcd, there), CLUSTER) as victim,
            Membership(SimulatedClient(etcd, here), CLUSTER) as membership,
        ):
            await victim.register(VICTIM)
            world = World(etcd, membership)
            tasks = [asyncio.create_task(world.evictions.run()), asyncio.create_task(world.watch())]
            await asyncio.sleep(5.0)
            await act(world)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert VICTIM not in world.evictions, "it would outlive its router"

    run_virtually(main())


def test_it_is_tried_until_etcd_is_back() -> None:
    async def act(world: World) -> None:
        world.etcd.go_down()
        started_s = world.etcd.now_s
        for _ in range(100):
            world.evictions.begin(VICTIM, lambda: True)
        assert world.etcd.now_s == started_s, "nobody waits"
        assert len(asyncio.all_tasks()) < 20, "they pile up"
        await asyncio.sleep(7.0)
        assert VICTIM in world.evictions and not world.num_losses()
        world.etcd.come_up(was_stopped=False)
        await asyncio.sleep(1.5)
        assert VICTIM not in world.evictions
        assert world.num_losses() == 1

    in_world(act)


def test_whom_nobody_was_told_of_may_come_back() -> None:
    async def act(world: World) -> None:
        world.etcd.go_down()
        is_back = False
        world.evictions.begin(VICTIM, lambda: not is_back)
        await asyncio.sleep(5.0)
        is_back = True
        await asyncio.sleep(5.0)
        assert VICTIM not in world.evictions
        world.etcd.come_up(was_stopped=False)
        await asyncio.sleep(5.0)
        assert not world.num_losses()

    in_world(act)


def test_its_end_is_that_of_its_router() -> None:
    async def act(world: World) -> None:
        world.etcd.go_down()
        world.evictions.begin(VICTIM, lambda: True)
        await asyncio.sleep(1.0)
        assert VICTIM in world.evictions

    in_world(act)
