"""The disk tier: what is stored comes back whole and checked, or not at all."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from common.kv.copies import copy_pieces
from common.kv.errors import LinkDamaged, LinkFull, LinkLost, LinkRefused, LinkTimeout
from common.kv.file_format import CHUNK_BYTES, PAGE_BYTES, by_chunk, chunk_digest
from common.kv.file_store import FileStore
from common.kv.geometry import CopyPlan
from common.kv.layout import PoolLayout
from tests.unit.kv.link_ends import descriptors, piece, random_pool, whole
from tests.unit.kv.processes import BIG, child, until
from tests.unit.kv.reference import layout

ROOM = 1 << 30
MEDIUM = layout(num_blocks=16, block_size=16, num_kv_heads=8, head_dim=64)
"""4 MiB: 16 chunks."""


@asynccontextmanager
async def opened(directory: Path, max_bytes: int = ROOM, timeout_s: float = 5.0) -> AsyncIterator[FileStore]:
    store = await FileStore.start(directory, max_bytes=max_bytes, timeout_s=timeout_s)
    try:
        yield store
    finally:
        await store.aclose()


async def stored(store: FileStore, key: str, pool_layout: PoolLayout = MEDIUM, seed: int = 0) -> None:
    source, link = random_pool(pool_layout, seed=seed), await store.create(key, pool_layout)
    await link.write(source, whole(pool_layout, pool_layout))
    await store.finish(link, key, f"note of {key}".encode())
    await link.aclose()


async def test_what_was_stored_outlives_the_store(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await stored(store, "sequence/7: stage 1")
        await stored(store, "x" * 1000, layout(), seed=1)
    async with opened(tmp_path) as store:
        assert await store.keys() == {"sequence/7: stage 1": MEDIUM, "x" * 1000: layout()}
        back = random_pool(MEDIUM, seed=9)
        link = await store.open("sequence/7: stage 1", back)
        assert link.note == b"note of sequence/7: stage 1" and link.layout == MEDIUM
        await link.read(back, whole(MEDIUM, MEDIUM))
        assert np.array_equal(back.memory, random_pool(MEDIUM).memory)
        with pytest.raises(LinkRefused, match="is finished, writer cannot write to it"):
            await link.write(back, piece(8))
        await link.aclose()
        await store.delete("sequence/7: stage 1")
        await store.delete("sequence/7: stage 1")
        assert list(await store.keys()) == ["x" * 1000]


async def test_a_file_is_visible_only_when_it_is_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await stored(store, "key", seed=1)
        back, link = random_pool(MEDIUM, seed=9), await store.create("key", MEDIUM)
        await link.write(random_pool(MEDIUM, seed=2), whole(MEDIUM, MEDIUM))
        before = await store.open("key", back)
        await before.read(back, whole(MEDIUM, MEDIUM))
        assert np.array_equal(back.memory, random_pool(MEDIUM, seed=1).memory)
        await store.finish(link, "key")
        await link.read(back, whole(MEDIUM, MEDIUM))
        assert np.array_equal(back.memory, random_pool(MEDIUM, seed=2).memory)
        await before.read(back, whole(MEDIUM, MEDIUM))  # who has the old one open reads the old one
        assert np.array_equal(back.memory, random_pool(MEDIUM, seed=1).memory)
        with pytest.raises(LinkRefused, match="finished already"):
            await store.finish(link, "key")
        given_up = await store.create("other", MEDIUM)
        for one in (before, link, given_up):
            await one.aclose()
        assert list(await store.keys()) == ["key"] and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("place", ["header", "first chunk", "last chunk", "trailer"])
async def test_damage_is_found_wherever_it_is(tmp_path: Path, place: str) -> None:
    async with opened(tmp_path) as store:
        await stored(store, "key")
        [path] = tmp_path.glob("*.kv")
        offset = {
            "header": 40,
            "first chunk": PAGE_BYTES + 5,
            "last chunk": PAGE_BYTES + MEDIUM.total_bytes - 3,
            "trailer": PAGE_BYTES + MEDIUM.total_bytes + 9,
        }[place]
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        back = random_pool(MEDIUM, seed=9)
        if place in ("header", "trailer"):
            with pytest.raises(LinkDamaged, match=place):
                await store.open("key", back)
            return
        link = await store.open("key", back)
        before = back.memory.copy()
        damaged = piece(8, source=offset - PAGE_BYTES - 5)
        with pytest.raises(LinkDamaged, match="chunk"):
            await link.read(back, damaged)
        assert np.array_equal(back.memory, before)
        await link.read(back, piece(CHUNK_BYTES, source=4 * CHUNK_BYTES))  # the others are as good as before
        await link.aclose()


async def test_a_file_that_was_cut_off_is_found_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await stored(store, "key")
        [path] = tmp_path.glob("*.kv")
        for num_bytes in (path.stat().st_size - 1, PAGE_BYTES + 100, PAGE_BYTES - 1, 0):
            os.truncate(path, num_bytes)
            with pytest.raises(LinkDamaged, match="cut off"):
                await store.open("key", random_pool(MEDIUM))


async def test_what_does_not_fit_is_refused_naming_both(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await stored(store, "key")
        other = random_pool(layout(fingerprint="other"), name="token-0-0")
        with pytest.raises(LinkRefused, match="model of token-0-0 is other, of key in .* it is model"):
            await store.open("key", other)
        with pytest.raises(LinkLost, match="No such file"):
            await store.open("nothing", other)
        [path] = tmp_path.glob("*.kv")
        path.rename(store._path("wrong"))
        with pytest.raises(LinkDamaged, match="wrong in .* holds key"):
            await store.open("wrong", random_pool(MEDIUM))
        with pytest.raises(LinkRefused, match="another process has it"):
            await FileStore.start(tmp_path, max_bytes=ROOM)


async def test_a_full_disk(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=6 << 20) as store:
        await stored(store, "first")
        before = descriptors()
        with pytest.raises(LinkFull, match="no room for"):
            await store.create("second", MEDIUM)
        with file_size_limit(1 << 20), pytest.raises(LinkFull, match="File too large"):
            await store.create("second", layout(num_blocks=8, block_size=16, num_kv_heads=8, head_dim=32))
        assert not list(tmp_path.glob("*.part")) and descriptors() <= before
        await store.delete("first")
        await stored(store, "second")


async def test_a_disk_that_hangs_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    async with opened(tmp_path, timeout_s=0.2) as store:
        link, source, hold = await store.create("key", MEDIUM), random_pool(MEDIUM), threading.Event()
        store._disk._executor.submit(hold.wait)
        with pytest.raises(LinkTimeout) as late:
            await link.read(source, whole(MEDIUM, MEDIUM))
        assert not late.value.may_still_write
        with pytest.raises(LinkTimeout):
            await store.create("other", MEDIUM)
        hold.set()
        with pytest.raises(LinkLost, match="took longer"):
            await link.write(source, whole(MEDIUM, MEDIUM))
        await link.aclose()
        assert np.array_equal(source.memory, random_pool(MEDIUM).memory)
        await until(lambda: not list(tmp_path.glob("*.part")))


async def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    for _ in range(3):
        with child("spiller", str(tmp_path)) as spiller:
            assert await asyncio.to_thread(spiller.read) == "finished"
            spiller.kill()
        async with opened(tmp_path) as store:
            assert list(await store.keys()) == ["key"] and not list(tmp_path.glob("*.part"))
            back = random_pool(BIG, seed=9)
            link = await store.open("key", back)
            await link.read(back, whole(BIG, BIG))
            assert (back.memory == back.memory[0]).all()
            await link.aclose()


@given(some.lists(some.tuples(some.integers(0, 999_000), some.integers(1, 600_000)), min_size=1, max_size=8))
def test_plans_are_cut_at_chunks(pieces: list[tuple[int, int]]) -> None:
    offsets, num_bytes = (np.array(side, dtype=np.int64) for side in zip(*pieces, strict=True))
    ends = np.cumsum(num_bytes)
    plan = CopyPlan(offsets, ends - num_bytes, num_bytes)
    source = np.random.default_rng(0).integers(0, 256, 1_600_000, dtype=np.uint8)
    once, in_parts = np.zeros(ends[-1], dtype=np.uint8), np.zeros(ends[-1], dtype=np.uint8)
    copy_pieces(plan, source, once)
    parts = by_chunk(plan.source_offset, plan)
    for number, part in parts:
        assert (part.source_offset // CHUNK_BYTES == number).all()
        assert ((part.source_offset + part.num_bytes - 1) // CHUNK_BYTES == number).all()
        copy_pieces(part, source, in_parts)
    assert [number for number, _ in parts] == sorted({number for number, _ in parts})
    assert np.array_equal(once, in_parts)


@given(some.integers(1, 5000), some.integers(0, 10**6), some.integers(1, 255))
def test_any_changed_byte_changes_the_digest(num_bytes: int, place: int, change: int) -> None:
    chunk = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    before = chunk_digest(chunk)
    chunk[place % num_bytes] ^= change
    assert chunk_digest(chunk) != before
    assert chunk_digest(np.zeros(num_bytes, dtype=np.uint8)) == 0


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """A disk that refuses to grow a file any further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
