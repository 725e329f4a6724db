"""Host memory that a GPU gathers from and scatters to."""

from __future__ import annotations

import pytest
import torch

from common.kv.device_copies import copy_between
from common.kv.page_lock import PageLock
from common.kv.pool import KvPool
from tests.unit.kv.link_ends import as_plan_says, random_pool, scattered, whole
from tests.unit.kv.processes import BIG

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_seen", [True, False], ids=["through the GPU", "through the host"])
@pytest.mark.parametrize("piece_bytes", [2048, 1 << 20])
def test_pieces_go_both_ways(piece_bytes: int, is_seen: bool) -> None:
    host, device = random_pool(BIG), KvPool.create(BIG, "cuda")
    lock = PageLock(host, device.device)
    seen = lock.seen if is_seen else None
    assert lock.seen is not None and host.arena.is_pinned()
    original = host.memory.copy()
    plan = scattered(32 << 20, piece_bytes, BIG.total_bytes)
    copy_between(plan, host, device, seen)
    torch.cuda.synchronize()
    assert as_plan_says(plan, original, device.arena.cpu().numpy())
    host.memory[:] = 0
    copy_between(whole(BIG, BIG), device, host, seen)
    torch.cuda.synchronize()
    assert as_plan_says(plan, original, host.memory)
    host.memory[:] = 0
    back = type(plan)(plan.destination_offset, plan.source_offset, plan.num_bytes)
    copy_between(back, device, host, seen)
    torch.cuda.synchronize()
    pieces = type(plan)(plan.source_offset, plan.source_offset, plan.num_bytes)
    assert as_plan_says(pieces, original, host.memory)
    lock.close()
    lock.close()
    host.close()
    device.close()


def test_memory_can_be_locked_again_once_it_was_let_go() -> None:
    host = random_pool(BIG)
    for _ in range(2):
        lock = PageLock(host, torch.device("cuda", 0))
        assert lock.seen is not None
        lock.close()
        assert not host.arena.is_pinned()
    host.close()


def test_pages_that_cannot_be_locked_make_it_slow_and_no_more() -> None:
    host, device = random_pool(BIG), KvPool.create(BIG, "cuda")
    lock = PageLock(host, device.device)
    refused = PageLock(host, device.device)  # they are locked
    assert refused.seen is None
    copy_between(scattered(32 << 20, 2048, BIG.total_bytes), host, device, refused.seen)
    torch.cuda.synchronize()
    refused.close()
    assert host.arena.is_pinned()  # what another has locked stays so
    lock.close()
    host.close()
    device.close()
