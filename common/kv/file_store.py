"""The disk tier: a directory of files, each of which holds the KV of something under a key of its own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from pathlib import Path

from common.kv.errors import LinkDamaged, LinkFull, LinkRefused
from common.kv.file_format import PAGE_BYTES, FileHeader, decode_header
from common.kv.file_link import Disk, FileLink, sync_directory
from common.kv.file_pool import FilePool, typed_errors
from common.kv.layout import PoolLayout
from common.kv.offer import misfit
from common.kv.pool import KvPool

DEFAULT_TIMEOUT_S = 30.0


class FileStore:
    """A directory that one process at a time has. A key names for example a sequence and a stage; its file is visible
    once it is finished, and then whole, also after a power cut.

    `max_bytes` bounds what all files take; `timeout_s` is the deadline of every call.
    """

    def __init__(self, disk: Disk, directory: Path, lock: int, max_bytes: int) -> None:
        self._disk = disk
        self._directory = directory
        self._lock = lock
        self.max_bytes = max_bytes
        self._room_bytes = 0  # as of the last look at the files, without what was freed since

    @classmethod
    async def start(cls, directory: Path, *, max_bytes: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> FileStore:
        """Makes the directory where there is none; files that somebody died over are removed. Raises `LinkRefused`
        where another process has it, `LinkFull`, `LinkTimeout`, `LinkLost`."""
        disk = Disk(str(directory), timeout_s)
        try:
            lock = await disk.run(lambda: _take(directory), os.close)
        except BaseException:
            disk.close()
            raise
        return cls(disk, directory, lock, max_bytes)

    async def create(self, key: str, layout: PoolLayout) -> FileLink:
        """A file of zeros to write to, and to `finish`; its room on the disk is taken at once. Raises `LinkFull`,
        `LinkTimeout`, `LinkLost`."""
        part = self._path(key).with_suffix(f".{secrets.token_hex(4)}.part")

        def create() -> FilePool:
            self._take_room(PAGE_BYTES + layout.total_bytes)
            with typed_errors(f"{self._directory} for {key}"):
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                return FilePool.create(fd, f"{self._directory} for {key}", layout)
            except BaseException:
                _remove(fd, part)
                raise

        pool = await self._disk.run(create, lambda unwanted: _remove(unwanted.fd, part))
        return FileLink(self._disk, pool, part)

    async def finish(self, link: FileLink, key: str, note: bytes = b"") -> None:
        """What `create` gave for this key is whole now and replaces what the key had before, on the disk. A
        `LinkError` means that nothing changed, unless it says `may_still_write`."""
        await link.finish(self._path(key), key, note)

    async def open(self, key: str, pool: KvPool) -> FileLink:
        """What is stored under a key, to be read into `pool`. Raises `LinkLost` where there is nothing, `LinkRefused`
        where it does not fit, `LinkDamaged`, `LinkTimeout`."""
        name = f"{key} in {self._directory}"

        def open_file() -> tuple[FilePool, bytes]:
            with typed_errors(name):
                fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                stored, header, note = FilePool.open(fd, name)
                _check_header(header, key, pool, name)
            except BaseException:
                os.close(fd)
                raise
            return stored, note

        stored, note = await self._disk.run(open_file, lambda unwanted: os.close(unwanted[0].fd))
        return FileLink(self._disk, stored, None, note)

    async def keys(self) -> dict[str, PoolLayout]:
        """What is stored, and its shape; files whose header is damaged are left out."""
        return await self._disk.run(self._headers)

    async def remove_damaged(self) -> list[str]:
        """Deletes the files that nobody can open any more, since their headers are damaged. Their names."""
        return await self._disk.run(self._remove_damaged)

    async def used_bytes(self) -> int:
        """What all files take, unfinished ones included."""
        return await self._disk.run(self._used_bytes)

    async def delete(self, key: str) -> None:
        """Whoever has it open can read on. No error where there is nothing."""

        def delete() -> None:
            with typed_errors(f"{key} in {self._directory}"):
                self._path(key).unlink(missing_ok=True)

        await self._disk.run(delete)

    async def aclose(self) -> None:
        """Lets go of the directory; close its links before. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            self._disk.close()

    def _path(self, key: str) -> Path:
        # any key makes a name: no separators, not too long
        return self._directory / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.kv"

    def _stored(self) -> list[Path]:
        with typed_errors(str(self._directory)):
            return list(self._directory.glob("*.kv"))

    def _used_bytes(self) -> int:
        with typed_errors(str(self._directory)):
            used_bytes = sum(entry.stat().st_size for entry in os.scandir(self._directory))
        self._room_bytes = self.max_bytes - used_bytes
        return used_bytes

    def _take_room(self, num_bytes: int) -> None:
        # many files take long to look at
        if num_bytes > self._room_bytes and num_bytes > self.max_bytes - (used_bytes := self._used_bytes()):
            raise LinkFull(f"{self._directory} has {used_bytes} of {self.max_bytes} bytes, no room for {num_bytes}")
        self._room_bytes -= num_bytes

    def _headers(self) -> dict[str, PoolLayout]:
        found = [_read_header(path) for path in self._stored()]
        return {header.key: header.layout for header in found if header is not None}

    def _remove_damaged(self) -> list[str]:
        damaged = [path for path in self._stored() if _read_header(path) is None]
        with typed_errors(str(self._directory)):
            for path in damaged:
                path.unlink()
        return [str(path) for path in damaged]


def _read_header(path: Path) -> FileHeader | None:
    """None where it is damaged: who opens the file will hear of it."""
    with typed_errors(path.name), path.open("rb") as file:
        page = file.read(PAGE_BYTES)
    try:
        return decode_header(page, path.name)
    except LinkDamaged:
        return None


def _take(directory: Path) -> int:
    """Locks the directory for the life of this process, and clears it of what a predecessor did not finish."""
    with typed_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in directory.glob("*.part"):
                part.unlink()
            sync_directory(directory)
        except BlockingIOError:
            os.close(lock)
            raise LinkRefused(f"process {os.getpid()} cannot have {directory}: another process has it") from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _check_header(header: FileHeader, key: str, pool: KvPool, name: str) -> None:
    if header.key != key:
        raise LinkDamaged(f"{name} holds {header.key}")
    reason = misfit(pool.name, pool.layout, name, header.layout)
    if reason is not None:
        raise LinkRefused(reason)


def _remove(fd: int, path: Path) -> None:
    os.close(fd)
    with typed_errors(path.name):
        path.unlink(missing_ok=True)
