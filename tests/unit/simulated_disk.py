"""A disk in memory, for the code that writes files: full, slow, failing, and cut off between any two bytes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import os
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from common.kv import file_format, file_link, file_pool, file_store

CHUNK_BYTES = 512
"""Files are made of several chunks, however small they are."""
DIRECTORY = "/disk"


class PowerCut(BaseException):
    """Whoever works on the disk ends here."""


@dataclass(eq=False)
class File:
    """`durable` is what would be there after a power cut; of what is `unsynced` (offset, bytes) each may be there, too,
    or a part of it."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)

    def put(self, offset: int, data: bytes) -> None:
        _put(self.content, offset, data)
        self.unsynced.append((offset, data))

    def after_power_cut(self, draws: random.Random) -> bytearray:
        found = bytearray(self.durable)
        for offset, data in draws.sample(self.unsynced, len(self.unsynced)):
            kept = draws.choice([0, draws.randint(0, len(data)), len(data)])
            if kept:
                _put(found, offset, data[:kept])
        return found


class SimulatedDisk:
    """One directory. `num_cuts_ahead` operations from now `on_cut` is called and nothing more happens."""

    def __init__(self, draws: random.Random, max_bytes: int) -> None:
        self.draws = draws
        self.max_bytes = max_bytes
        self.names: dict[str, File] = {}
        self.failure_rate = 0.0
        self.hang_rate = 0.0
        self.cut_in: int | None = None
        self.on_cut: Callable[[], None] = lambda: None
        self.num_rotten = self.num_failures = 0
        self.life = 0
        """rises with every process that is gone: what it had begun never happens"""
        self._durable_names: dict[str, File] = {}
        self._unsynced_names: list[tuple[str, File | None]] = []
        self._open: dict[int, File | None] = {}
        self._num_opened = 100
        self._lock: int | None = None

    # ------------------------------------------------------------ what happens to it

    def end_process(self, *, power_is_cut: bool) -> None:
        """Nobody has anything open any more; what was not synced is lost, in part, if the power is cut."""
        self.life += 1
        self._open.clear()
        self._lock = self.cut_in = None
        if not power_is_cut:
            return
        # a journal keeps the order of names, up to where it was cut
        self.names = dict(self._durable_names)
        num_kept = self.draws.randint(0, len(self._unsynced_names))
        for name, file in self._unsynced_names[:num_kept]:
            _rename(self.names, name, file)
        for name, file in self.names.items():
            content = file.after_power_cut(self.draws)
            self.names[name] = File(content, bytearray(content))
        self._durable_names, self._unsynced_names = dict(self.names), []

    def rot(self) -> str | None:
        """A bit flips on the disk; the name of the file."""
        names = sorted(name for name, file in self.names.items() if file.content)
        if not names:
            return None
        name = self.draws.choice(names)
        file = self.names[name]
        used = [place for place, byte in enumerate(file.content) if byte]
        if not used:
            return None
        self.num_rotten += 1
        place, bit = self.draws.choice(used), 1 << self.draws.randrange(8)
        for data in (file.content, file.durable):
            if place < len(data):
                data[place] ^= bit
        return name

    @property
    def used_bytes(self) -> int:
        return sum(len(file.content) for file in self.names.values())

    @property
    def num_open(self) -> int:
        return len(self._open)

    def _operate(self, *, may_fail: bool = True) -> None:
        """Before everything that it does. Raises `OSError`, `PowerCut`."""
        if self.cut_in is not None:
            self.cut_in -= 1
            if self.cut_in < 0:
                raise PowerCut
        if may_fail and self.draws.random() < self.failure_rate:
            self.num_failures += 1
            raise OSError(errno.EIO, "simulated failure")

    # ------------------------------------------------------------ files, as `os` has them

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._operate()
        file = None
        if not flags & os.O_DIRECTORY:
            file = self.names.get(path.name)
            if file is not None and flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, "exists")
            if file is None and not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file")
            if file is None:
                file = File()
                self.rename(path.name, file)
        self._num_opened += 1
        self._open[self._num_opened] = file
        return self._num_opened

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)  # a process that is gone may still clear up
        if self._lock == fd:
            self._lock = None

    def flock(self, fd: int, how: int) -> None:
        if self._lock is not None:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self._lock = fd

    def posix_fallocate(self, fd: int, offset: int, num_bytes: int) -> None:
        self._operate()
        self._write(fd, b"\0" * num_bytes, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._operate()
        data = bytes(data)
        count = self.draws.randint(1, len(data)) if self.draws.random() < 0.1 else len(data)
        self._write(fd, data[:count], offset)
        return count

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        file = self._file(fd)
        grown_by = max(0, offset + len(data) - len(file.content))
        if grown_by > self.max_bytes - self.used_bytes:
            raise OSError(errno.ENOSPC, "simulated disk is full")
        file.put(offset, data)

    def pread(self, fd: int, num_bytes: int, offset: int) -> bytes:
        self._operate()
        return bytes(self._file(fd).content[offset : offset + num_bytes])

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        [buffer] = buffers
        data = self.pread(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def fdatasync(self, fd: int) -> None:
        """Where it fails, what was written may be lost, and nobody will say so again."""
        file = self._file(fd)
        try:
            self._operate()
        except OSError:
            file.durable, file.unsynced = file.after_power_cut(self.draws), []
            raise
        file.durable, file.unsynced = bytearray(file.content), []

    def fsync(self, fd: int) -> None:
        """Of the directory."""
        self._operate()
        assert self._open[fd] is None
        self._durable_names, self._unsynced_names = dict(self.names), []

    def scandir(self, path: object) -> list[Any]:
        self._operate()
        sizes = {name: len(file.content) for name, file in self.names.items()}
        return [SimpleNamespace(stat=lambda size=size: SimpleNamespace(st_size=size)) for size in sizes.values()]

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # constants

    def _file(self, fd: int) -> File:
        file = self._open[fd]
        assert file is not None
        return file

    def rename(self, name: str, file: File | None) -> None:
        _rename(self.names, name, file)
        self._unsynced_names.append((name, file))

    def path(self) -> Any:
        return type("Path", (SimulatedPath,), {"disk": self})(DIRECTORY)


class SimulatedPath(PurePosixPath):
    """What `pathlib.Path` does, on the simulated disk."""

    disk: SimulatedDisk

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        self.disk._operate()

    def glob(self, pattern: str) -> list[Any]:
        self.disk._operate()
        return [self / name for name in sorted(self.disk.names) if PurePosixPath(name).match(pattern)]

    def unlink(self, *, missing_ok: bool = False) -> None:
        self.disk._operate()
        if self.name in self.disk.names:
            self.disk.rename(self.name, None)
        elif not missing_ok:
            raise FileNotFoundError(errno.ENOENT, "no such file")

    def replace(self, target: SimulatedPath) -> None:
        self.disk._operate()
        self.disk.rename(target.name, self.disk.names[self.name])
        # the other half of the same entry in the journal
        self.disk.names.pop(self.name)
        self.disk._unsynced_names.append((self.name, None))

    def open(self, mode: str) -> io.BytesIO:
        self.disk._operate()
        if self.name not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return io.BytesIO(bytes(self.disk.names[self.name].content))


class SimulatedExecutor:
    """The disk's thread: one piece of work after the other, each done when its time is over."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk
        self._life = disk.life
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_busy = False

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.append((future, work))
        self._begin()
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        for future, _ in self._queue:
            future.cancel()
        self._queue.clear()

    def _begin(self) -> None:
        while self._queue and not self._is_busy:
            future, work = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                self._is_busy = True
                asyncio.get_running_loop().call_later(self._duration_s(), self._end, future, work)

    def _duration_s(self) -> float:
        draws = self._disk.draws
        if draws.random() < self._disk.hang_rate:
            return draws.uniform(*draws.choice([(0.1, 3.0), (0.1, 3.0), (5.0, 25.0)]))
        return draws.uniform(1e-4, 2e-3)

    def _end(self, future: Future[Any], work: Callable[[], Any]) -> None:
        if self._life != self._disk.life:
            return  # its process is gone
        try:
            result = work()
        except PowerCut:
            self._disk.on_cut()
            return
        except BaseException as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        else:
            future.set_result(result)
        self._is_busy = False
        self._begin()


def put_in_place(disk: SimulatedDisk, patch: pytest.MonkeyPatch) -> None:
    """The code that writes files finds this disk where it looks for its own."""
    for module in (file_pool, file_link, file_store):
        patch.setattr(module, "os", disk)
    locks = SimpleNamespace(flock=disk.flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    patch.setattr(file_store, "fcntl", locks)
    patch.setattr(file_link, "ThreadPoolExecutor", lambda num_threads, thread_name_prefix: SimulatedExecutor(disk))
    names = disk.draws
    patch.setattr(file_store, "secrets", SimpleNamespace(token_hex=lambda count: names.randbytes(count).hex()))
    for module in (file_pool, file_format):
        patch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(b"\0" * (offset - len(content)))
    content[offset : offset + len(data)] = data


def _rename(names: dict[str, File], name: str, file: File | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file
