"""Strikes do what they say, to processes that are no services."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from dejavu import AsyncClient
from loadtest.strikes import Scene, damage_stores, limit_files
from tests.unit.kv.reference import layout

WRITES = """
import os, sys
for line in sys.stdin:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, 4096)
        print(0, flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def scene(name: str, pid: int) -> Scene:
    store: dict[str, Any] = {"name": name, "role": "cache_store", "state": "active", "pid": pid}
    return Scene(AsyncClient("tcp://127.0.0.1:1"), {"services": [store]}, random.Random(0))


async def test_every_page_of_a_store_s_pool_that_was_written_to_is_damaged() -> None:
    shape: PoolLayout = layout(num_blocks=64)
    pool = KvPool.create(shape, name="cache-store-7")
    pool.memory[: shape.total_bytes // 2] = 1
    before = pool.memory.copy()
    assert await damage_stores(scene("cache-store-7", os.getpid())) == []
    changed = np.flatnonzero(pool.memory != before)
    assert changed.tolist() == list(range(0, shape.total_bytes // 2, 4096))
    with pytest.raises(LookupError, match="cache-store-8"):
        await damage_stores(scene("cache-store-8", os.getpid()))
    pool.close()


async def test_files_cannot_grow_for_a_while(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin is not None and child.stdout is not None
        await limit_files(0.0)(scene("cache-store-0", child.pid))
        child.stdin.write("now\n")
        assert int(child.stdout.readline()) == errno.EFBIG
        await asyncio.sleep(0)  # the limit is lifted by a timer of no length
        await asyncio.sleep(0)
        child.stdin.write("again\n")
        assert int(child.stdout.readline()) == 0
        child.stdin.close()
