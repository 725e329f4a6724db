"""The end of a segment's writing comes late, fails behind the point of no return, or finds another text on the shelf:
what is in the file then is what counts, not what was thought to be there."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from common.kv.errors import LinkLost
from common.kv.file_link import FileLink
from services.cache_store import disk
from tests.unit.test_disk_tier import IDS, Store, opened

OTHER = list(range(900, 1000))
KEY = "a/0"


class Stall:
    """The disk takes its time over the next file that is to be whole."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._begun, self._may_go_on = threading.Event(), threading.Event()
        fdatasync = os.fdatasync

        def wait(fd: int) -> None:
            self._begun.set()
            assert self._may_go_on.wait(60)
            fdatasync(fd)

        patch.setattr(os, "fdatasync", wait)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, 60)

    def go_on(self) -> None:
        self._may_go_on.set()


async def keep_first(store: Store) -> None:
    """40 tokens of a text are on disk, and another one takes its place in memory."""
    assert store.keep(KEY, IDS, 0, 40)
    await store.tier.write_behind()
    assert store.keep(KEY, OTHER, 0, 40)


async def keep_first_again(store: Store, directory: Path) -> None:
    """... which goes: the first one is there again. It must be on disk, whatever became of the other."""
    assert store.keep(KEY, IDS, 0, 40)
    await store.tier.write_behind()
    assert store.shelf.replicas[KEY].num_on_disk == 40
    await store.tier.aclose()
    async with opened(directory) as next_store:
        await next_store.check(KEY, IDS, 40)


async def test_what_was_given_up_may_be_in_the_file_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(disk, "FAILURE_PAUSE_S", 0.0)
    async with opened(tmp_path) as store:
        await keep_first(store)
        with monkeypatch.context() as patch:
            stall = Stall(patch)
            await store.tier.write_behind()
            assert store.tier.figures()["failures"]
            stall.go_on()
            await store.tier._files.keys()  # one thing after the other: it is in the file now
        await keep_first_again(store, tmp_path)


async def test_what_may_not_survive_a_power_cut_is_in_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "simulated failure")

    monkeypatch.setattr(disk, "FAILURE_PAUSE_S", 0.0)
    async with opened(tmp_path) as store:
        await keep_first(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)  # of the directory
            await store.tier.write_behind()
            assert store.tier.figures()["failures"]
        await keep_first_again(store, tmp_path)


async def test_what_became_another_text_while_it_was_finished_is_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = IDS[:20] + OTHER[:20]
    async with opened(tmp_path) as store:
        assert store.keep(KEY, IDS, 0, 40)
        with monkeypatch.context() as patch:
            stall = Stall(patch)
            passing = asyncio.ensure_future(store.tier.write_behind())
            await stall.begun()
            assert store.keep(KEY, text, 20, 40)
            stall.go_on()
            await passing
        await store.tier.write_behind()
    async with opened(tmp_path) as store:
        await store.check(KEY, text, 40)


async def test_who_is_cancelled_ends_though_the_file_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was to stop while its disk failed went on writing behind."""

    async def fail(link: FileLink) -> None:
        await close(link)
        raise LinkLost("simulated failure")

    close = FileLink.aclose
    monkeypatch.setattr(FileLink, "aclose", fail)
    async with opened(tmp_path) as store:
        assert store.keep(KEY, IDS, 0, 40)
        with monkeypatch.context() as patch:
            stall = Stall(patch)
            running = asyncio.create_task(store.tier.run())
            await stall.begun()
            running.cancel()
            stall.go_on()
            await asyncio.wait([running], timeout=5.0)
        assert running.cancelled()
