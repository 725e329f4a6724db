"""What a ZeroMQ door of a device pool puts in and takes out, which any device can check."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from common.kv.copies import gather, scatter
from common.kv.device_door import DeviceDoor
from common.kv.pool import KvPool
from tests.unit.kv.link_ends import random_pool, scattered
from tests.unit.kv.reference import layout

ROOMY = layout(num_blocks=64, block_size=16)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
@pytest.mark.parametrize("piece_bytes", [64, 4096])
def test_pieces_reach_their_places_and_come_back(device: str, piece_bytes: int) -> None:
    host = random_pool(ROOMY)
    pool = host if device == "cpu" else KvPool.create(ROOMY, device)
    pool.arena.copy_(torch.from_numpy(host.memory.copy()))
    expected, door = host.memory.copy(), DeviceDoor(pool)
    plan = scattered(64 << 10, piece_bytes, ROOMY.total_bytes)
    assert np.array_equal(
        door.take(plan.source_offset, plan.num_bytes), gather(expected, plan.source_offset, plan.num_bytes)
    )
    payload = np.random.default_rng(1).integers(0, 256, plan.total_bytes, dtype=np.uint8)
    payload.setflags(write=False)
    door.put(payload, plan.destination_offset, plan.num_bytes)
    scatter(payload, plan.destination_offset, plan.num_bytes, expected)
    assert np.array_equal(pool.arena.cpu().numpy(), expected)


def test_a_closed_pool_lets_go_of_its_memory_though_its_door_is_still_there() -> None:
    pool = KvPool(ROOMY, torch.zeros(ROOMY.total_bytes, dtype=torch.uint8), None, "pool")
    door, memory = DeviceDoor(pool), weakref.ref(pool.arena)
    pool.close()
    assert memory() is None, door
