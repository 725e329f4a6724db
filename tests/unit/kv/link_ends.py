"""Two ends of every kind of link, so that one suite can run over all of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from common.kv.choice import restricted
from common.kv.file_format import PAGE_BYTES
from common.kv.file_store import FileStore
from common.kv.geometry import CopyPlan, plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, Link, LinkError, open_link
from common.kv.nixl_agent import nixl_module
from common.kv.pool import Bytes, KvPool
from common.kv.server import PoolServer
from tests.unit.kv.processes import BIG

_NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(nixl_module() is None, reason="needs the transfer library: pip install .[nixl]")
)
OWNED = ["shm", "zmq", _NIXL]
"""The kinds of link at whose other end is a process."""
KINDS = [*OWNED, "file"]
"""Every kind of link."""
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Ends:
    """Our pool, full of random bytes, the link, and what lies at its other end (zeros at first)."""

    source: KvPool
    link: Link
    theirs: Callable[[], Bytes]
    server: PoolServer | None = None
    """The owner's, where there is one."""


@asynccontextmanager
async def connected(kind: str, ours: PoolLayout = BIG, theirs: PoolLayout = BIG) -> AsyncIterator[Ends]:
    """Both ends of a link, in this process."""
    async with _to_file(ours, theirs) if kind == "file" else _to_owner(kind, ours, theirs) as ends:
        yield ends


@asynccontextmanager
async def _to_file(ours: PoolLayout, theirs: PoolLayout) -> AsyncIterator[Ends]:
    with tempfile.TemporaryDirectory() as directory:
        store = await FileStore.start(Path(directory), max_bytes=1 << 30, timeout_s=TIMEOUT_S)
        source, link = random_pool(ours), await store.create("sequence-0/0", theirs)
        [path] = Path(directory).glob("*.part")
        try:
            yield Ends(source, link, lambda: np.fromfile(path, np.uint8, theirs.total_bytes, offset=PAGE_BYTES))
        finally:
            await link.aclose()
            await store.aclose()
            source.close()


@asynccontextmanager
async def _to_owner(kind: str, ours: PoolLayout, theirs: PoolLayout) -> AsyncIterator[Ends]:
    source, destination = random_pool(ours), KvPool.create(theirs, name="owner")
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    link = await open_link(only(kind, server.offer), source, timeout_s=TIMEOUT_S)
    try:
        yield Ends(source, link, lambda: destination.memory, server)
    finally:
        await link.aclose()
        await server.aclose()
        source.close()
        destination.close()


def only(kind: str, offer: GrantOffer) -> GrantOffer:
    """The offer of an owner that knows no better link."""
    return restricted(offer, kind)


def random_pool(pool_layout: PoolLayout, name: str = "writer", seed: int = 0) -> KvPool:
    pool = KvPool.create(pool_layout, name=name)
    pool.memory[:] = np.random.default_rng(seed).integers(0, 256, len(pool.memory), dtype=np.uint8)
    return pool


def whole(ours: PoolLayout, theirs: PoolLayout) -> CopyPlan:
    """All that both pools have in common."""
    num_tokens = min(ours.num_blocks * ours.block_size, theirs.num_blocks * theirs.block_size)
    return plan_copies(ours, range(ours.num_blocks), theirs, range(theirs.num_blocks), (0, num_tokens), theirs.layers)


def piece(num_bytes: int, source: int = 0, destination: int = 0) -> CopyPlan:
    return CopyPlan(np.array([source]), np.array([destination]), np.array([num_bytes]))


def scattered(num_bytes: int, piece_bytes: int, total_bytes: int, seed: int = 1) -> CopyPlan:
    """Pieces of equal size at places that do not overlap, in no order on either side."""
    generator, count = np.random.default_rng(seed), num_bytes // piece_bytes
    places = [generator.permutation(total_bytes // piece_bytes)[:count] * piece_bytes for _ in range(2)]
    return CopyPlan(places[0], places[1], np.full(count, piece_bytes))


def as_plan_says(plan: CopyPlan, source: Bytes, destination: Bytes) -> bool:
    """Whether all pieces are at their places, seen one by one."""
    pieces = zip(plan.source_offset.tolist(), plan.destination_offset.tolist(), plan.num_bytes.tolist(), strict=True)
    return all(np.array_equal(source[start : start + size], destination[to : to + size]) for start, to, size in pieces)


def descriptors() -> set[str]:
    """What this process has open. What a thread of a library closes meanwhile is not."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def shared_memory() -> set[str]:
    """Entries of /dev/shm, less those of OpenMP."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("__KMP_")}


async def close_quietly(link: Link) -> None:
    try:
        await link.aclose()
    except LinkError as error:
        assert error.may_still_write
