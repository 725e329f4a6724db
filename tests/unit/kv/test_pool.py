from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import sys
import threading
import time

import pytest
import torch

from common.kv.layout import PoolLayout, num_blocks_for
from common.kv.pool import _MADV_POPULATE_WRITE, KvPool, _is_populated

LAYOUT = PoolLayout(
    first_layer=2, last_layer=5, num_blocks=8, block_size=4, num_kv_heads=3, head_dim=10, dtype="bfloat16",
    fingerprint="model",
)  # fmt: skip


def test_sizes() -> None:
    assert (LAYOUT.num_layers, LAYOUT.itemsize, LAYOUT.slot_bytes) == (3, 2, 60)
    assert LAYOUT.bytes_per_token_layer == 120
    assert LAYOUT.bytes_per_block == 4 * 120 * 3
    assert LAYOUT.total_bytes == 8 * LAYOUT.bytes_per_block
    assert num_blocks_for(LAYOUT, 8 * LAYOUT.bytes_per_block + 7) == 8


@pytest.mark.parametrize("change", [{"dtype": "int64"}, {"num_blocks": 0}, {"last_layer": 2}, {"first_head": -1}])
def test_impossible_layouts_are_refused(change: dict[str, int | str]) -> None:
    fields = {name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__}
    with pytest.raises(ValueError):
        PoolLayout(**{**fields, **change})


def test_views_lie_where_the_layout_says() -> None:
    pool = KvPool.create(LAYOUT)
    key, value = pool.layer(1)
    assert key.shape == value.shape == (8, 4, 3, 10) and key.dtype is torch.bfloat16
    value[2, 3] = 1.0
    touched = pool.memory.nonzero()[0]
    keys, _ = LAYOUT.planes((3, 4))
    first = (keys + 1) * LAYOUT.plane_bytes + (2 * 4 + 3) * LAYOUT.slot_bytes
    assert first <= touched.min() and touched.max() < first + LAYOUT.slot_bytes
    key[7] = 1.0
    assert pool.memory[keys * LAYOUT.plane_bytes + 7 * 4 * LAYOUT.slot_bytes :][1] != 0
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux")
def test_memory_is_shared_sealed_and_gone_after_close() -> None:
    pool = KvPool.create(LAYOUT, name="sealed")
    fd = pool.fd
    assert fd is not None
    other = mmap.mmap(fd, LAYOUT.total_bytes)
    pool.layer(0)[0].fill_(1.0)
    assert other[1] != 0
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    view = pool.layer(0)[0]
    pool.close()
    pool.close()
    assert view[0, 0, 0, 0] == 1.0  # a view keeps the memory
    with pytest.raises(OSError):
        os.fstat(fd)
    other.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_pool() -> None:
    pool = KvPool.create(LAYOUT, "cuda")
    assert pool.layer(0)[0].is_cuda and pool.fd is None
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every page is touched")
def test_others_run_while_memory_is_mapped() -> None:
    """It takes long where it is much, and an event loop that stands still is taken for dead."""
    ticks, is_over = [time.perf_counter()], threading.Event()

    def tick() -> None:
        while not is_over.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        began_s = time.perf_counter()
        assert _is_populated(mmap.mmap(-1, 256 << 20), _MADV_POPULATE_WRITE)
        took_s = time.perf_counter() - began_s
    finally:
        is_over.set()
        ticker.join()
    assert max(after - before for before, after in itertools.pairwise(ticks)) < took_s / 2
