"""A pool that lies in a file. Everything here blocks; `file_link` runs it in a thread."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from common.kv.checksum import Digests
from common.kv.copies import copy_pieces
from common.kv.errors import LinkDamaged, LinkFull, LinkLost, LinkRefused
from common.kv.file_format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    PAGE_BYTES,
    FileHeader,
    FileTrailer,
    by_chunk,
    chunk_digest,
    decode_header,
    decode_trailer,
    encode_header,
    num_chunks,
)
from common.kv.gate import Gate
from common.kv.geometry import CopyPlan
from common.kv.layout import PoolLayout
from common.kv.pool import Bytes

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FilePool:
    """One file, called `name` in errors. Raises `LinkFull`, `LinkDamaged` and, for any other trouble with the disk,
    `LinkLost`."""

    def __init__(self, fd: int, name: str, layout: PoolLayout, digests: Digests) -> None:
        self.fd = fd
        self.name = name
        self.layout = layout
        self._digests = digests
        self._chunk = np.empty(CHUNK_BYTES, dtype=np.uint8)
        self._one_at_a_time = threading.Lock()

    @classmethod
    def create(cls, fd: int, name: str, layout: PoolLayout) -> FilePool:
        """Zeros, with room on the disk for all of them."""
        with typed_errors(name):
            os.posix_fallocate(fd, 0, PAGE_BYTES + layout.total_bytes)
        return cls(fd, name, layout, np.zeros(num_chunks(layout.total_bytes), dtype=np.uint64))

    @classmethod
    def open(cls, fd: int, name: str) -> tuple[FilePool, FileHeader, bytes]:
        """A file that was finished, its header and the note in it."""
        with typed_errors(name):
            header = decode_header(os.pread(fd, PAGE_BYTES, 0), name)
            if header.version != FORMAT_VERSION:
                raise LinkRefused(f"{name} has format {header.version}, this program reads {FORMAT_VERSION}")
            trailer = os.pread(fd, header.trailer_bytes + 1, PAGE_BYTES + header.layout.total_bytes)
        digests, note = decode_trailer(trailer, header, name)
        return cls(fd, name, header.layout, digests), header, note

    def write(self, plan: CopyPlan, source: Bytes, gate: Gate) -> None:
        """Chunk by chunk; what a chunk held besides is checked and kept."""
        with self._one_at_a_time:
            for number, part in by_chunk(plan.destination_offset, plan):
                start = number * CHUNK_BYTES
                inside = CopyPlan(part.source_offset, part.destination_offset - start, part.num_bytes)
                chunk = self._chunk[: min(CHUNK_BYTES, self.layout.total_bytes - start)]
                if not _covers(inside, len(chunk)):
                    self._load(number, chunk)
                with gate:
                    copy_pieces(inside, source, chunk)
                self._store(number, chunk)

    def read(self, plan: CopyPlan, destination: Bytes, gate: Gate) -> None:
        """Chunk by chunk; nothing of a damaged chunk comes through."""
        with self._one_at_a_time:
            for number, part in by_chunk(plan.source_offset, plan):
                start = number * CHUNK_BYTES
                chunk = self._chunk[: min(CHUNK_BYTES, self.layout.total_bytes - start)]
                self._load(number, chunk)
                with gate:
                    inside = CopyPlan(part.source_offset - start, part.destination_offset, part.num_bytes)
                    copy_pieces(inside, chunk, destination)

    def finish(self, key: str, note: bytes) -> None:
        """Writes trailer and header, and returns once all of it is on the disk."""
        with self._one_at_a_time, typed_errors(self.name):
            trailer = msgspec.msgpack.encode(FileTrailer(self._digests.astype("<u8").tobytes(), note))
            header = FileHeader(FORMAT_VERSION, key, self.layout, len(trailer), zlib.crc32(trailer))
            _write_all(self.fd, trailer, PAGE_BYTES + self.layout.total_bytes)
            _write_all(self.fd, encode_header(header), 0)
            os.fdatasync(self.fd)

    def _load(self, number: int, chunk: Bytes) -> None:
        with typed_errors(self.name):
            num_bytes = os.preadv(self.fd, [chunk.data], PAGE_BYTES + number * CHUNK_BYTES)
        if num_bytes != len(chunk) or chunk_digest(chunk) != int(self._digests[number]):
            raise LinkDamaged(f"chunk {number} of {self.name} is damaged or cut off")

    def _store(self, number: int, chunk: Bytes) -> None:
        with typed_errors(self.name):
            _write_all(self.fd, chunk.data, PAGE_BYTES + number * CHUNK_BYTES)
        self._digests[number] = chunk_digest(chunk)


@contextmanager
def typed_errors(name: str) -> Iterator[None]:
    """Turns what the system says about a file into a `LinkError`."""
    try:
        yield
    except OSError as error:
        kind = LinkFull if error.errno in _NO_ROOM else LinkLost
        raise kind(f"{name}: {error.strerror}") from error


def _covers(plan: CopyPlan, num_bytes: int) -> bool:
    """Whether the plan's destination is each byte of [0, num_bytes), once."""
    if plan.total_bytes != num_bytes:
        return False
    order = np.argsort(plan.destination_offset)
    ends = np.cumsum(plan.num_bytes[order])
    return bool((plan.destination_offset[order][1:] == ends[:-1]).all())


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)
