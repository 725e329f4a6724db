"""The link to a file on disk: what is written comes back checked, or not at all.

A thread does the reading and writing. It touches our memory one chunk at a time and only while somebody waits for it:
a call that is given up leaves our memory alone at once, even where the disk hangs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from common.kv.copies import check_plan
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.file_pool import FilePool, typed_errors
from common.kv.gate import Gate, GivenUp
from common.kv.geometry import CopyPlan
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool

Result = TypeVar("Result")


class Disk:
    """A thread that may block, and the deadline of whatever it does."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-disk")

    async def run(
        self, work: Callable[[], Result], undo: Callable[[Result], None] | None = None, *, is_owed: bool = False
    ) -> Result:
        """Raises what `work` raises, and `LinkTimeout`. `undo` gets the result that nobody waited for. What has not
        begun when nobody waits any more is dropped, unless it `is_owed`."""
        running = self._executor.submit(work)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await asyncio.shield(asyncio.wrap_future(running))
        except BaseException as error:
            if (is_owed or not running.cancel()) and undo is not None:
                running.add_done_callback(lambda done: None if done.exception() else undo(done.result()))
            if isinstance(error, TimeoutError):
                raise LinkTimeout(f"{self.name} took longer than {self.timeout_s} s") from None
            raise

    def close(self) -> None:
        """What was begun goes on in the background."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class FileLink:
    """`part` is the file's name as long as it is not finished; then it can be written to. A finished file is only
    read. `note` is what it was finished with."""

    name = "file"

    def __init__(self, disk: Disk, pool: FilePool, part: Path | None, note: bytes = b"") -> None:
        self.note = note
        self._disk = disk
        self._pool = pool
        self._part = part
        self._gates: set[Gate] = set()
        self._failure: LinkError | None = None

    @property
    def layout(self) -> PoolLayout:
        """What the file holds."""
        return self._pool.layout

    @property
    def is_over(self) -> bool:
        """See `Link.is_over`."""
        return self._failure is not None

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`; also raises `LinkFull` and `LinkDamaged`."""
        check_plan(plan, source.layout.total_bytes, self.layout.total_bytes)
        self._check()
        if self._part is None:
            raise LinkRefused(f"{self._pool.name} is finished, {source.name} cannot write to it")
        await self._gated(lambda gate: self._pool.write(plan, source.memory, gate), may_still_write=True)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`; also raises `LinkDamaged`."""
        check_plan(plan, self.layout.total_bytes, destination.layout.total_bytes)
        self._check()
        await self._gated(lambda gate: self._pool.read(plan, destination.memory, gate), may_still_write=False)

    async def finish(self, path: Path, key: str, note: bytes) -> None:
        """Makes the file visible as `path`, whole and on the disk. Raises `LinkError`; unless that says
        `may_still_write`, it is not visible then."""
        self._check()
        part = self._part
        if part is None:
            raise LinkRefused(f"{self._pool.name} is finished already")

        def finish() -> None:
            self._pool.finish(key, note)
            with typed_errors(self._pool.name):
                part.replace(path)
            try:
                with typed_errors(self._pool.name):
                    sync_directory(path.parent)
            except LinkError as error:
                raise type(error)(error.message, may_still_write=True) from error

        try:
            await self._disk.run(finish)
        except LinkTimeout as late:
            self._failure = late
            raise LinkTimeout(late.message, may_still_write=True) from None
        self._part = None
        self.note = note

    async def aclose(self) -> None:
        """See `Link.aclose`. A file that is not finished is gone, or, where the disk fails (`LinkLost`), will be when
        the store is started next."""
        if self._pool.fd < 0:
            return
        self._failure = self._failure or LinkLost(f"the link to {self._pool.name} was closed")
        for gate in self._gates:
            gate.shut()
        try:
            await self._disk.run(self._let_go, is_owed=True)
        except LinkTimeout as late:
            raise LinkTimeout(late.message, may_still_write=True) from None

    def _let_go(self) -> None:
        fd, self._pool.fd = self._pool.fd, -1
        os.close(fd)
        if self._part is not None:
            with typed_errors(self._pool.name):
                self._part.unlink(missing_ok=True)

    def _check(self) -> None:
        if self._failure is not None:
            raise LinkLost(self._failure.message)

    async def _gated(self, work: Callable[[Gate], None], *, may_still_write: bool) -> None:
        gate = Gate()
        self._gates.add(gate)
        try:
            await self._disk.run(lambda: work(gate))
        except LinkTimeout as late:
            self._failure = late
            raise LinkTimeout(late.message, may_still_write=may_still_write) from None
        except GivenUp:
            self._check()
            raise
        finally:
            gate.shut()
            self._gates.discard(gate)


def sync_directory(directory: Path) -> None:
    """Returns when the names in it are on the disk. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
