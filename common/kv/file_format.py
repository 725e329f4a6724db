"""How a file holds a pool: a page with the header, the pool's bytes, and a trailer with the digest of each chunk.

The header is written last and names the size and the CRC of the trailer, so a file is either whole or found out."""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np

from common.kv.checksum import Digests, word_factors
from common.kv.errors import LinkDamaged
from common.kv.geometry import CopyPlan, Int64
from common.kv.layout import PoolLayout
from common.kv.pool import Bytes

FORMAT_VERSION = 1
PAGE_BYTES = 4096
CHUNK_BYTES = 256 << 10
"""So much is read, checked and written at once."""
_MAGIC = b"dejavukv"
_PREFIX = struct.Struct("<8sII")


class FileHeader(msgspec.Struct, frozen=True, array_like=True):
    """`key` is what the file was stored under; `trailer_bytes` and `trailer_crc` tell a torn file."""

    version: int
    key: str
    layout: PoolLayout
    trailer_bytes: int
    trailer_crc: int


class FileTrailer(msgspec.Struct, frozen=True, array_like=True):
    """`digests`: little-endian uint64 per chunk. `note` is the owner's own, for example the token ids."""

    digests: bytes
    note: bytes


_HEADER, _TRAILER = msgspec.msgpack.Decoder(FileHeader), msgspec.msgpack.Decoder(FileTrailer)


def encode_header(header: FileHeader) -> bytes:
    """One page. Raises `ValueError` for a key that does not fit."""
    body = msgspec.msgpack.encode(header)
    page = _PREFIX.pack(_MAGIC, len(body), zlib.crc32(body)) + body
    if len(page) > PAGE_BYTES:
        raise ValueError(f"a key of {len(header.key)} characters is too long")
    return page.ljust(PAGE_BYTES, b"\0")


def decode_header(page: bytes, name: str) -> FileHeader:
    """Inverse of `encode_header`. Raises `LinkDamaged`, calling the file `name`."""
    if len(page) != PAGE_BYTES:
        raise LinkDamaged(f"{name} is cut off within its header")
    magic, num_bytes, crc = _PREFIX.unpack_from(page)
    body = page[_PREFIX.size : _PREFIX.size + num_bytes]
    if magic != _MAGIC or zlib.crc32(body) != crc:
        raise LinkDamaged(f"the header of {name} is damaged")
    try:
        return _HEADER.decode(body)
    except msgspec.DecodeError as error:
        raise LinkDamaged(f"the header of {name} is of no version we know: {error}") from error


def decode_trailer(frame: bytes, header: FileHeader, name: str) -> tuple[Digests, bytes]:
    """Digests and note. Raises `LinkDamaged`."""
    if len(frame) != header.trailer_bytes or zlib.crc32(frame) != header.trailer_crc:
        raise LinkDamaged(f"the trailer of {name} is damaged or cut off")
    trailer = _TRAILER.decode(frame)
    digests = np.frombuffer(trailer.digests, dtype="<u8").astype(np.uint64)
    if len(digests) != num_chunks(header.layout.total_bytes):
        raise LinkDamaged(f"{name} has {len(digests)} digests, which do not fit its layout")
    return digests, trailer.note


def num_chunks(total_bytes: int) -> int:
    return -(-total_bytes // CHUNK_BYTES)


def chunk_digest(chunk: Bytes) -> int:
    """64 bits that any change of a chunk changes: the sum of its words times fixed odd numbers; 0 for zeros."""
    words = chunk[: len(chunk) // 8 * 8].view(np.uint64)
    digest = np.einsum("w,w->", words, _FACTORS[: len(words)])
    rest = int.from_bytes(chunk[len(words) * 8 :].tobytes(), "little")
    return (int(digest) + rest * _LAST_FACTOR) & 0xFFFF_FFFF_FFFF_FFFF


def by_chunk(offsets: Int64, plan: CopyPlan) -> list[tuple[int, CopyPlan]]:
    """The plan cut where `offsets` (its side on the disk) cross from one chunk to the next, and grouped by chunk."""
    within = offsets % CHUNK_BYTES
    num_cuts = -(-(within + plan.num_bytes) // CHUNK_BYTES)
    piece = np.repeat(np.arange(len(plan)), num_cuts)
    cut = np.arange(len(piece)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    starts = np.maximum(cut * CHUNK_BYTES - within[piece], 0)
    ends = np.minimum((cut + 1) * CHUNK_BYTES - within[piece], plan.num_bytes[piece])
    chunks = (offsets[piece] + starts) // CHUNK_BYTES
    order = np.argsort(chunks, kind="stable")
    source = (plan.source_offset[piece] + starts)[order]
    destination = (plan.destination_offset[piece] + starts)[order]
    num_bytes = (ends - starts)[order]
    numbers, firsts = np.unique(chunks[order], return_index=True)
    bounds = [*firsts.tolist(), len(order)]
    return [
        (number, CopyPlan(source[first:end], destination[first:end], num_bytes[first:end]))
        for number, first, end in zip(numbers.tolist(), bounds[:-1], bounds[1:], strict=True)
    ]


_FACTORS = word_factors(CHUNK_BYTES // 8)
_LAST_FACTOR = 0xD1B54A32D192ED03
