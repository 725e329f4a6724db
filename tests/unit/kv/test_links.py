"""What every link has to keep, whatever it is made of."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import uvloop

from common.kv.copies import split
from common.kv.geometry import CopyPlan, plan_copies
from common.kv.link import LinkLost
from common.kv.zmq_link import ZmqLink
from common.kv.zmq_messages import MAX_IN_FLIGHT
from tests.unit.kv.link_ends import (
    KINDS,
    OWNED,
    as_plan_says,
    connected,
    descriptors,
    piece,
    random_pool,
    scattered,
    whole,
)
from tests.unit.kv.processes import BIG, until
from tests.unit.kv.reference import layout

every_kind = pytest.mark.parametrize("kind", KINDS)
SIZES_BYTES = [4 << 10, 64 << 10, 1 << 20, (4 << 20) + 4096]


@every_kind
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_bytes_are_there(kind: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def check() -> None:
        async with connected(kind) as ends:
            assert ends.link.name == kind
            for num_bytes in SIZES_BYTES:
                for plan in (piece(num_bytes, 8192, 4096), scattered(num_bytes, 1024, BIG.total_bytes)):
                    await ends.link.write(ends.source, plan)
                    assert as_plan_says(plan, ends.source.memory, ends.theirs())

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())


@every_kind
async def test_what_was_written_can_be_read(kind: str) -> None:
    async with connected(kind) as ends:
        await ends.link.write(ends.source, whole(BIG, BIG))
        back = random_pool(BIG, seed=2)
        for num_bytes in SIZES_BYTES:
            for plan in (piece(num_bytes, 8192, 4096), scattered(num_bytes, 1024, BIG.total_bytes, seed=3)):
                await ends.link.read(back, plan)
                assert as_plan_says(plan, ends.source.memory, back.memory)
        await ends.link.read(back, whole(BIG, BIG))
        assert np.array_equal(back.memory, ends.source.memory)


@every_kind
async def test_pools_that_are_cut_differently(kind: str) -> None:
    theirs = layout(first_layer=1, last_layer=3, num_blocks=32, block_size=128, num_kv_heads=8, head_dim=64)
    async with connected(kind, BIG, theirs) as ends:
        plan = whole(BIG, theirs)
        await ends.link.write(ends.source, plan)
        assert as_plan_says(plan, ends.source.memory, ends.theirs())
        back = random_pool(BIG, seed=2)
        await ends.link.read(back, CopyPlan(plan.destination_offset, plan.source_offset, plan.num_bytes))
        for local in (1, 2):
            for ours, again in zip(ends.source.layer(local), back.layer(local), strict=True):
                assert np.array_equal(ours.numpy().view(np.uint8), again.numpy().view(np.uint8))


@every_kind
async def test_many_small_pieces(kind: str) -> None:
    theirs = msgspec.structs.replace(BIG, num_kv_heads=3, first_head=2)
    async with connected(kind, BIG, theirs) as ends:
        blocks = np.random.default_rng(1).permutation(256).tolist()
        plan = plan_copies(BIG, range(256), theirs, blocks, (0, 4096), (0, 4))
        assert len(plan) == 4096 * 8
        await ends.link.write(ends.source, plan)
        assert as_plan_says(plan, ends.source.memory, ends.theirs())


@every_kind
async def test_many_at_the_same_time(kind: str) -> None:
    async with connected(kind) as ends:
        plans = [
            plan_copies(BIG, range(256), BIG, range(256), (first, first + 64), (layer, layer + 1))
            for first, layer in itertools.product(range(0, 4096, 64), range(4))
        ]
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                tasks.create_task(ends.link.write(ends.source, plan))
        assert np.array_equal(ends.source.memory, ends.theirs())
        back = random_pool(BIG, seed=2)
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                tasks.create_task(ends.link.read(back, plan))
        assert np.array_equal(ends.source.memory, back.memory)


@every_kind
async def test_a_plan_that_leaves_either_pool_is_refused(kind: str) -> None:
    async with connected(kind) as ends:
        before = ends.source.memory.copy()
        for offset in (-1, BIG.total_bytes - 7, 1 << 62):
            for plan in (piece(8, source=offset), piece(8, destination=offset)):
                with pytest.raises(ValueError, match="do not lie within"):
                    await ends.link.write(ends.source, plan)
                with pytest.raises(ValueError, match="do not lie within"):
                    await ends.link.read(ends.source, plan)
        assert not ends.theirs().any() and np.array_equal(before, ends.source.memory)
        await ends.link.write(ends.source, whole(BIG, BIG))
        assert np.array_equal(ends.source.memory, ends.theirs())


@every_kind
async def test_a_closed_link_does_nothing_more(kind: str) -> None:
    async with connected(kind) as ends:
        await ends.link.aclose()
        await ends.link.aclose()
        before = ends.source.memory.copy()
        for call in (ends.link.write, ends.link.read):
            with pytest.raises(LinkLost) as lost:
                await call(ends.source, whole(BIG, BIG))
            assert not lost.value.may_still_write
        assert np.array_equal(before, ends.source.memory)


@every_kind
async def test_cancelled_calls_leave_our_memory_alone(kind: str) -> None:
    """However far they have come; and the link goes on."""
    async with connected(kind) as ends:
        await ends.link.write(ends.source, whole(BIG, BIG))
        for num_turns in (0, 1, 3, 10, 40):
            target = random_pool(BIG, seed=4)
            for call in (ends.link.read, ends.link.write):
                task = asyncio.create_task(call(target if call == ends.link.read else ends.source, whole(BIG, BIG)))
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                target.memory[:] = 7
                await ends.link.write(ends.source, piece(4096))
                assert (target.memory == 7).all()
        back = random_pool(BIG, seed=5)
        await ends.link.read(back, whole(BIG, BIG))
        assert np.array_equal(ends.source.memory, back.memory)


@every_kind
async def test_opening_and_closing_leaks_no_descriptor(kind: str) -> None:
    async def open_and_close() -> None:
        async with connected(kind, layout(), layout()) as ends:
            await ends.link.write(ends.source, whole(layout(), layout()))

    await open_and_close()
    before = descriptors()
    for _ in range(5):
        await open_and_close()
    await until(lambda: len(descriptors()) <= len(before))


@pytest.mark.parametrize("kind", OWNED)
async def test_the_owner_says_who_can_reach_its_pool(kind: str) -> None:
    async with connected(kind) as ends:
        server = ends.server
        assert server is not None and server.peers == {"writer": kind}
        await ends.link.aclose()
        await until(lambda: server.peers == {})


async def test_no_more_than_a_few_messages_are_in_flight() -> None:
    async with connected("zmq") as ends:
        assert isinstance(ends.link, ZmqLink)
        most, calls = 0, [ends.link.write, ends.link.read, ends.link.write]
        tasks = [asyncio.create_task(call(ends.source, whole(BIG, BIG))) for call in calls]
        while not all(task.done() for task in tasks):
            most = max(most, len(ends.link._requests))
            await asyncio.sleep(0)
        assert most == MAX_IN_FLIGHT
        await asyncio.gather(*tasks)


def test_split_cuts_into_parts_of_at_most_the_size() -> None:
    sizes = np.array([10, 3, 3, 25, 1])
    plan = CopyPlan(np.cumsum(sizes) - sizes, 100 + np.cumsum(sizes) - sizes, sizes)
    parts = list(split(plan, 10))
    assert [part.num_bytes.tolist() for part in parts] == [[10], [3, 3], [10], [10], [5, 1]]
    assert np.concatenate([part.source_offset for part in parts]).tolist() == [0, 10, 13, 16, 26, 36, 41]
    assert all(np.array_equal(part.destination_offset, part.source_offset + 100) for part in parts)
