"""GPU memory of another process; and the copies between devices, which any device can check."""

from __future__ import annotations

import asyncio
import gc
import random
import select
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import torch

from common.kv.arrival import Arrival, pool_checksum
from common.kv.checksum import SpanBinding
from common.kv.choice import restricted
from common.kv.copies import copy_pieces
from common.kv.cuda_driver import gpu_ids
from common.kv.device_copies import copy_on_device
from common.kv.fence import Fence
from common.kv.geometry import CopyPlan, plan_copies
from common.kv.link import LinkLost, open_link
from common.kv.memory_door import MemoryDoor, enter
from common.kv.offer import CudaMemory, GrantOffer, host_id
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from tests.unit.kv.link_ends import TIMEOUT_S, piece, random_pool, scattered, whole
from tests.unit.kv.processes import BIG, Child, child, owner
from tests.unit.kv.reference import layout, random_pair
from tests.unit.kv.sharing import can_share_gpu_memory, skip_unless_shared

on_gpu = [
    pytest.mark.gpu,
    # several processes import torch and make a context, one after the other
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_device_copies_do_what_host_copies_do() -> None:
    generator = random.Random(0)
    for _ in range(300):
        pair = random_pair(generator)
        plan = plan_copies(
            pair.source, pair.source_blocks, pair.destination, pair.destination_blocks,
            pair.token_range, pair.layer_range, pair.head_range,
        )  # fmt: skip
        check_copies(plan, pair.source.total_bytes, pair.destination.total_bytes)
    for num_bytes in (4096, 1 << 20):
        check_copies(scattered(num_bytes, 1024, BIG.total_bytes), BIG.total_bytes, BIG.total_bytes)
    check_copies(whole(BIG, BIG), BIG.total_bytes, BIG.total_bytes)


def check_copies(plan: CopyPlan, source_bytes: int, destination_bytes: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, source_bytes, dtype=np.uint8)
    expected, copied = np.zeros(destination_bytes, dtype=np.uint8), torch.zeros(destination_bytes, dtype=torch.uint8)
    copy_pieces(plan, source, expected)
    copy_on_device(plan, torch.from_numpy(source), copied)
    assert np.array_equal(expected, copied.numpy())
    copied.zero_()
    copy_on_device(
        plan, torch.from_numpy(source), copied, source_seen=torch.from_numpy(source), destination_seen=copied[:]
    )
    assert np.array_equal(expected, copied.numpy())


def test_the_door_of_a_gpu_pool_hands_out_the_handle() -> None:
    """And no descriptor beside it, which only host memory has."""
    ours, memory = layout(), CudaMemory(bytes(range(64)), 512, "GPU-1")
    pool = KvPool(ours, torch.zeros(ours.total_bytes, dtype=torch.uint8), None, "owner")
    door = MemoryDoor(pool, Fence(), memory)
    offer = GrantOffer("owner", "first", ours, host_id(), "", b"token", door.address, "GPU-1")
    with ThreadPoolExecutor(1) as executor:
        entering = executor.submit(enter, offer, pool, "cuda_ipc", TIMEOUT_S)
        while not door.peers:
            ready = select.select(door.filenos, [], [], TIMEOUT_S)[0]
            assert ready
            for fileno in ready:
                door.on_readable(fileno, offer)
        entrance = entering.result()
    assert (entrance.fd, entrance.welcome.cuda) == (None, memory)
    entrance.close()
    door.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
async def test_without_a_gpu_nothing_is_offered() -> None:
    assert gpu_ids() == []
    server = await PoolServer.start(KvPool.create(layout()), "127.0.0.1", "first")
    assert server.offer.gpu_id is None
    await server.aclose()


@pytest.fixture
def shared_memory() -> None:
    skip_unless_shared()


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.usefixtures("shared_memory")
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    async def test_the_bytes_are_there_and_come_back(self, device: str) -> None:
        with owner("--device", "cuda") as (process, offer):
            source = on(device, 0)
            link = await open_link(restricted(offer, "cuda_ipc"), source, timeout_s=TIMEOUT_S)
            assert link.name == "cuda_ipc"
            for plan in (whole(BIG, BIG), scattered(1 << 20, 1024, BIG.total_bytes), whole(BIG, BIG)):
                await link.write(source, plan)
            assert await intact(process, source)
            back = on(device, 1)
            await link.read(back, whole(BIG, BIG))
            assert torch.equal(back.arena, source.arena)
            for call in (link.read, link.write):
                with pytest.raises(ValueError, match="do not lie within"):
                    await call(source, piece(8, source=BIG.total_bytes - 4))
            await link.aclose()
            with pytest.raises(LinkLost):
                await link.write(source, piece(8))

    @pytest.mark.usefixtures("shared_memory")
    async def test_a_copy_comes_after_what_the_stream_was_given_before(self) -> None:
        with owner("--device", "cuda") as (process, offer):
            source = on("cuda", 0)
            link = await open_link(restricted(offer, "cuda_ipc"), source, timeout_s=TIMEOUT_S)
            busy = torch.ones(4096, 4096, device="cuda")
            for _ in range(50):
                busy = busy @ busy * 1e-4
            source.arena.fill_(9)
            await link.write(source, whole(BIG, BIG))
            back = on("cuda", 1)
            await link.read(back, whole(BIG, BIG))
            assert bool((back.arena == 9).all())
            assert await intact(process, source)
            await link.aclose()

    @pytest.mark.usefixtures("shared_memory")
    async def test_a_killed_owner_ends_the_link(self) -> None:
        """And no more. In a process of its own, whose other tests would fail as well were the GPU lost to it."""
        with (
            owner("--device", "cuda") as (process, offer),
            child("writer", offer.encode(), "--device", "cuda") as writer,
        ):
            assert await asyncio.to_thread(writer.read) == "written"
            process.kill()
            while (said := await asyncio.to_thread(writer.read)) == "written":
                pass
            assert said == "sound"

    async def test_the_link_is_the_best_that_there_can_be(self) -> None:
        """Also where nobody can share a GPU's memory."""
        with owner("--device", "cuda") as (process, offer):
            source = on("cuda", 0)
            link = await open_link(msgspec.structs.replace(offer, has_nixl=False), source, timeout_s=TIMEOUT_S)
            assert link.name == ("cuda_ipc" if can_share_gpu_memory() else "zmq")
            host = on("cpu", 0)
            await link.write(host, whole(BIG, BIG))
            assert await intact(process, source)
            await link.aclose()

    async def test_several_links_into_one_pool_end_one_by_one(self) -> None:
        skip_unless_shared()
        with owner("--device", "cuda") as (process, offer):
            source = on("cuda", 0)
            first, second = [await open_link(restricted(offer, "cuda_ipc"), source, timeout_s=TIMEOUT_S) for _ in "12"]
            await first.write(source, whole(BIG, BIG))
            await first.aclose()
            source.arena.fill_(7)
            await second.write(source, whole(BIG, BIG))
            assert await intact(process, source)
            await second.aclose()

    async def test_a_closed_pool_gives_its_memory_back(self) -> None:
        """A stage that changes its role makes another pool; all that belonged to the first may still be referred to."""
        gc.collect()  # what other tests have left
        before = torch.cuda.memory_allocated()
        pool = on("cuda", 0)
        server = await PoolServer.start(pool, "127.0.0.1", "first")
        link = await open_link(restricted(server.offer, "zmq"), on("cpu", 1), timeout_s=TIMEOUT_S)
        await link.write(on("cpu", 1), whole(BIG, BIG))
        await link.aclose()
        await server.aclose()
        pool.close()
        assert torch.cuda.memory_allocated() == before, (server, link)

    async def test_the_own_process_falls_back(self) -> None:
        destination, source = on("cuda", 0), on("cuda", 1)
        server = await PoolServer.start(destination, "127.0.0.1", "first")
        link = await open_link(msgspec.structs.replace(server.offer, has_nixl=False), source, timeout_s=TIMEOUT_S)
        assert link.name == "zmq"
        await link.aclose()
        await server.aclose()


def on(device: str, seed: int) -> KvPool:
    pool = KvPool.create(BIG, device, name="writer")
    pool.arena.copy_(random_pool(BIG, seed=seed).arena)
    return pool


async def intact(process: Child, source: KvPool) -> bool:
    """Whether the owner finds in its pool what we have in ours."""
    tokens, layers, blocks = (0, 4096), BIG.layers, list(range(256))
    checksum = pool_checksum(source, blocks, SpanBinding(BIG.fingerprint, "sequence", layers, tokens, b""))
    arrival = Arrival("owner", 0, "sequence", 1, layers, 0, 4096, blocks, b"", checksum)
    process.write(msgspec.json.encode(arrival).decode())
    return await asyncio.to_thread(process.read) == "True"
