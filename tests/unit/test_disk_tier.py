"""What a store writes behind to disk comes back whole, however often it was cut and whatever happened to the files."""

from __future__ import annotations

import asyncio
import math
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from common.kv.checksum import Digests
from common.kv.errors import LinkRefused
from common.kv.file_format import PAGE_BYTES
from common.kv.geometry import span_slots
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.kv.token_ids import ID_BYTES
from common.messages import pack_ids
from common.replica_messages import ReplicaItem
from services.cache_store.disk import DiskTier
from services.cache_store.segments import MAX_SEGMENT_TOKENS, Segment, SegmentNote, chain, new_note, next_segment
from services.cache_store.shelf import COLD_S, Shelf

LAYOUT = PoolLayout(0, 3, 64, 8, 2, 8, "float32", "model")
NUM_PLANES = 2 * LAYOUT.num_layers
ROOM = 1 << 28
ROOT = Path(__file__).parents[2]
IDS = list(range(100, 400))


def kv_of(token_ids: list[int], position: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What the cache of a position holds, [plane][byte]: it depends on all ids up to there."""
    seed = hash(tuple(token_ids[: position + 1])) & 0xFFFFFFFF
    return np.random.default_rng(seed).integers(0, 256, (NUM_PLANES, LAYOUT.slot_bytes), dtype=np.uint8)


@dataclass
class Store:
    """A shelf, its pool and its disk; the clock of the shelf is turned by hand."""

    pool: KvPool
    shelf: Shelf
    tier: DiskTier
    now_s: float = 0.0

    def forget_all(self) -> None:
        for key in list(self.shelf.replicas):
            self.shelf.forget(key)

    def keep(self, key: str, token_ids: list[int], start: int, end: int) -> bool:
        """Tokens [start, end) arrive."""
        item = ReplicaItem(key, start, end - start, [], pack_ids(token_ids[start:]))
        blocks = self.shelf.make_room("token-0", item, self.now_s)
        if blocks is None:
            return False
        slots = span_slots(LAYOUT, blocks, (start, end), LAYOUT.layers, LAYOUT.heads)
        for slot, position in zip(slots, range(start, end), strict=True):
            self.planes[:, slot] = kv_of(token_ids, position)
        self.shelf.commit(item, digests(token_ids, start, end))
        return True

    async def check(self, key: str, token_ids: list[int], num_tokens: int) -> None:
        """Whoever asks for these ids gets the KV of so many."""
        if self.shelf.is_asleep(key):
            await self.tier.recall(key)
        found = self.shelf.locate(key, pack_ids(token_ids), self.now_s)
        assert (found[1] if found else 0) == num_tokens
        if found is None:
            return
        slots = span_slots(LAYOUT, found[0].blocks, (0, num_tokens), LAYOUT.layers, LAYOUT.heads)
        for position, slot in enumerate(slots):
            assert np.array_equal(self.planes[:, slot], kv_of(token_ids, position))
        assert np.array_equal(found[0].digests[:, :num_tokens], digests(token_ids, 0, num_tokens))

    @property
    def planes(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self.pool.memory.reshape(NUM_PLANES, -1, LAYOUT.slot_bytes)


def digests(token_ids: list[int], start: int, end: int) -> Digests:
    return np.stack([kv_of(token_ids, p).view(np.uint64).sum(axis=1) for p in range(start, end)], axis=1)


@asynccontextmanager
async def opened(directory: Path, max_bytes: int = ROOM, layout: PoolLayout = LAYOUT) -> AsyncIterator[Store]:
    pool, shelf = KvPool.create(layout, name="store"), Shelf(layout.num_blocks, layout.block_size)
    tier = await DiskTier.start(directory, max_bytes, pool, shelf)
    try:
        yield Store(pool, shelf, tier)
    finally:
        await tier.aclose()
        pool.close()


async def test_what_was_written_behind_outlives_the_store(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert store.keep("a/0", IDS, 0, 117)
        await store.tier.write_behind()
        for end in range(118, 150):
            assert store.keep("a/0", IDS, end - 1, end)
            await store.tier.write_behind()
        assert store.keep("b#1/0", IDS[50:], 0, 3) and store.keep("ended/0", IDS, 0, 40)
        await store.tier.write_behind()
        store.shelf.forget("ended/0")
        await store.tier.write_behind()
        assert store.keep("a/0", IDS, 149, 160)  # nobody has written this when everything dies
    async with opened(tmp_path) as store:
        assert sorted(store.shelf.claim("token-7", 1, 0, 60.0) or []) == ["a/0", "b#1/0"]
        assert store.shelf.kv_blocks()["free"] == LAYOUT.num_blocks
        await store.check("a/0", IDS, 149)
        await store.check("b#1/0", IDS[50:], 3)
        assert store.keep("a/0", IDS, 149, 151)
        await store.tier.write_behind()
        await store.check("a/0", IDS, 151)
    async with opened(tmp_path) as store:
        await store.check("a/0", IDS[:70] + [1] + IDS[71:], 70)
        store.shelf.claim("token-0", 1, 0, 60.0)
        store.shelf.sweep(61.0)  # nobody asked
        await store.tier.write_behind()
        assert not list(tmp_path.glob("*.kv")) and store.tier.figures()["used_bytes"] == 0


async def test_another_text_under_the_same_key_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    other = [*IDS[:50], *range(900, 1100)]
    async with opened(tmp_path) as store:
        for start, end in ((0, 40), (40, 60), (60, 70), (70, 80)):
            assert store.keep("a/0", IDS, start, end)
            await store.tier.write_behind()
        assert store.keep("a/0", other, 50, 75)
        await store.tier.write_behind()
        await store.check("a/0", other, 75)
    async with opened(tmp_path) as store:
        await store.check("a/0", other, 75)
        assert store.shelf.replicas["a/0"].token_ids == pack_ids(other[:75])


@pytest.mark.parametrize("place", ["header", "kv", "note"])
async def test_behind_a_damaged_byte_nothing_is_offered(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        assert store.keep("a/0", IDS, 0, 200)
        await store.tier.write_behind()
        first = set(tmp_path.glob("*.kv"))
        assert store.keep("a/0", IDS, 200, 230)
        await store.tier.write_behind()
        [second] = set(tmp_path.glob("*.kv")) - first
    offset = {"header": 30, "kv": PAGE_BYTES + 500, "note": second.stat().st_size - 5}[place]
    content = bytearray(second.read_bytes())
    content[offset] ^= 1
    second.write_bytes(content)
    async with opened(tmp_path) as store:
        await store.check("a/0", IDS, 200)
        assert store.tier.figures()["damaged"] == 1 and "damaged" in caplog.text
        assert set(tmp_path.glob("*.kv")) == first
        assert store.keep("a/0", IDS, 200, 210)
        await store.tier.write_behind()
        await store.check("a/0", IDS, 210)


async def test_a_full_disk_costs_nothing_but_the_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(tmp_path, max_bytes=2 * 200 * LAYOUT.bytes_per_token_layer * LAYOUT.num_layers) as store:
        assert store.keep("a/0", IDS, 0, 200)
        await store.tier.write_behind()
        assert store.keep("b/0", IDS, 0, 200)
        for _ in range(2):
            store.tier._paused_until_s = 0.0
            await store.tier.write_behind()
        figures = store.tier.figures()
        assert (figures["full"], figures["sequences"], figures["failures"]) == (2, 1, 0)
        assert caplog.text.count("no room") == 1
        await store.check("b/0", IDS, 200)
        store.shelf.forget("a/0")
        store.tier._paused_until_s = 0.0
        await store.tier.write_behind()
        assert store.tier.figures()["sequences"] == 1
    async with opened(tmp_path) as store:
        await store.check("b/0", IDS, 200)


async def test_a_cold_replica_makes_way_and_comes_back(tmp_path: Path) -> None:
    """The pool holds 512 tokens."""
    async with opened(tmp_path) as store:
        assert store.keep("a/0", IDS, 0, 250) and store.keep("b/0", IDS, 0, 250)
        store.now_s = COLD_S
        assert not store.keep("c/0", IDS, 0, 250)  # they are cold, but not on disk
        await store.tier.write_behind()
        assert store.keep("a/0", IDS, 250, 251)
        assert store.keep("c/0", IDS, 0, 250)
        assert [key for key in ("a/0", "b/0", "c/0") if store.shelf.is_asleep(key)] == ["b/0"]
        await store.tier.recall("b/0")
        assert store.shelf.is_asleep("b/0")  # nobody is cold
        await store.tier.write_behind()
        store.now_s = 1e9  # later than the clock that `recall` reads, so that only b may be called back
        store.shelf.replicas["c/0"].used_at_s = time.monotonic() - COLD_S
        store.shelf.replicas["a/0"].used_at_s = time.monotonic()
        await store.check("b/0", IDS, 250)
        assert store.shelf.is_asleep("c/0")
        assert not store.keep("c/0", IDS, 250, 260)  # it cannot be continued in its sleep,
        assert store.shelf.replicas["c/0"].expires_at_s is not None
        assert store.keep("a/0", IDS, 251, 252)


async def test_what_is_dropped_while_it_is_written_is_not_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for drop in (lambda: store.shelf.forget("a/0"), lambda: store.keep("a/0", IDS[9:], 0, 100)):
            assert store.keep("a/0", IDS, 0, 200)
            writing = asyncio.ensure_future(store.tier.write_behind())
            while not list(tmp_path.glob("*.part")):  # noqa: ASYNC110 - the tier tells nobody
                await asyncio.sleep(0)
            drop()
            await writing
            assert not list(tmp_path.glob("*.kv"))


async def test_what_is_dropped_while_it_is_read_stays_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert store.keep("a/0", IDS, 0, 200)
        await store.tier.write_behind()
    for drop_first in (False, True):
        async with opened(tmp_path) as store:
            reading = asyncio.ensure_future(store.tier.recall("a/0"))
            while store.shelf.kv_blocks()["free"] == LAYOUT.num_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert store.keep("a/0", IDS[9:], 0, 100)
            if drop_first:
                store.shelf.forget("a/0")
            await reading
            await store.check("a/0", IDS[9:], 0 if drop_first else 100)
            store.forget_all()
            assert store.shelf.kv_blocks()["free"] == LAYOUT.num_blocks


async def test_files_of_another_model_are_not_used(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert store.keep("a/0", IDS, 0, 20)
        await store.tier.write_behind()
        with pytest.raises(LinkRefused, match="another process has it"):
            await DiskTier.start(tmp_path, ROOM, store.pool, store.shelf)
    async with opened(tmp_path, layout=PoolLayout(0, 4, 64, 8, 2, 8, "float32", "model")) as store:
        assert not store.shelf.replicas and not list(tmp_path.glob("*.kv"))


async def test_in_any_order_of_events_what_is_found_is_what_was_kept(tmp_path: Path) -> None:
    """Texts grow, are cut, end and are asked for while passes and recalls are under way, in too small a memory."""
    num_recalled = 0
    for seed in range(6):
        async with opened(tmp_path) as store:
            known = await _work_at_random(store, random.Random(seed))
            num_recalled += store.tier.figures()["recalled"]
        async with opened(tmp_path) as store:
            for key, num_tokens in known.items():
                num_found = store.shelf.replicas[key].num_tokens
                assert num_found >= num_tokens  # what was cut off may still be there
                await store.check(key, [int(key[0]), *IDS], num_found)
                store.shelf.forget(key)
            await store.tier.write_behind()
    assert num_recalled


async def _work_at_random(store: Store, draws: random.Random) -> dict[str, int]:
    """Returns what is kept in the end, all of it on disk."""
    lengths: dict[str, int] = {}
    store.now_s = time.monotonic()
    passing = asyncio.ensure_future(store.tier.write_behind())
    for _ in range(200):
        store.now_s += COLD_S / 3
        key = f"{draws.randrange(9)}/0"
        ids = [int(key[0]), *IDS]
        match draws.randrange(6):
            case 0 | 1:
                length = lengths.get(key, 0)
                start = draws.randint(0, length) if draws.random() < 0.2 else length
                end = min(start + draws.choice([1, 2, 60, 150]), len(ids))
                lengths[key] = end if start < end and store.keep(key, ids, start, end) else 0
            case 2 if draws.random() < 0.3:
                store.shelf.forget(key)
                lengths.pop(key, None)
            case 3 if passing.done():
                await passing
                passing = asyncio.ensure_future(store.tier.write_behind())
            case 4:
                await store.tier.recall(key)
                found = store.shelf.locate(key, pack_ids(ids), store.now_s)
                await store.check(key, ids, found[1] if found else 0)
            case _:
                await asyncio.sleep(0)
    await passing
    await store.tier.write_behind()
    figures = store.tier.figures()
    assert not figures["failures"] and not figures["damaged"]
    known = {key: replica.num_tokens for key, replica in store.shelf.replicas.items()}
    store.forget_all()
    assert store.shelf.kv_blocks()["free"] == LAYOUT.num_blocks
    return known


def test_killed_at_any_moment_a_writer_leaves_a_chain_of_whole_segments(tmp_path: Path) -> None:
    draws = random.Random(1)
    for _ in range(3):
        command = [sys.executable, "-m", "tests.unit.test_disk_tier", str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        written = 0
        for line in process.stdout:
            written = int(line)
            if written >= 20 and draws.random() < 0.1:
                break
        process.kill()
        written = max([written, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
        process.wait()
        process.stdout.close()
        asyncio.run(_check_after_kill(tmp_path, written))


async def _check_after_kill(directory: Path, written: int) -> None:
    async with opened(directory) as store:
        num_tokens = store.shelf.replicas["a/0"].num_tokens
        assert num_tokens >= written
        await store.check("a/0", IDS, num_tokens)
        assert store.tier.figures()["damaged"] == 0
        store.forget_all()
        await store.tier.write_behind()


async def _write_until_killed(directory: Path) -> None:
    async with opened(directory) as store:
        for end in range(1, len(IDS)):
            assert store.keep("a/0", IDS, end - 1, end)
            await store.tier.write_behind()
            print(end, flush=True)  # noqa: T201


def test_segments_are_few_and_written_few_times() -> None:
    draws = random.Random(2)
    for _ in range(50):
        segments: list[Segment] = []
        num_tokens = num_written = 0
        while num_tokens < 5000:
            num_tokens += draws.choice([1, 1, 1, 2, 7, draws.randint(1, 300)])
            while not segments or segments[-1].end < num_tokens:
                start, end = next_segment(segments, num_tokens)
                assert 0 < end - start <= MAX_SEGMENT_TOKENS
                segments = [s for s in segments if s.start < start] + [Segment(start, end, b"")]
                num_written += end - start
            starts = [segment.start for segment in segments]
            assert starts == [0, *(segment.end for segment in segments)][:-1]
        levels = math.log2(MAX_SEGMENT_TOKENS)
        assert len(segments) <= num_tokens / (MAX_SEGMENT_TOKENS / 2) + levels
        assert num_written <= num_tokens * (levels + 1)


def test_a_chain_ignores_what_does_not_continue_it() -> None:
    ids = pack_ids(IDS)
    other = pack_ids([7, *IDS[1:]])

    def note(start: int, end: int, of: bytes = ids) -> SegmentNote:
        return new_note(start, of[: end * ID_BYTES], digests(IDS, start, end))

    notes = [note(40, 60), note(0, 40), note(50, 60), note(60, 70, other), note(75, 80)]
    segments, token_ids = chain(notes)
    assert [(segment.start, segment.end) for segment in segments] == [(0, 40), (40, 60)]
    assert token_ids == pack_ids(IDS[:60])


if __name__ == "__main__":
    asyncio.run(_write_until_killed(Path(sys.argv[1])))
