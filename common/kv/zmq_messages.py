"""What goes over a ZeroMQ link: requests with pieces of KV, each answered once it is carried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from common.kv.copies import gather, scatter
from common.kv.geometry import Int64
from common.kv.pool import Bytes

MAX_MESSAGE_BYTES = 4 << 20
MAX_IN_FLIGHT = 4
"""Messages of one link that are not answered yet."""
_MIN_DIRECT_BYTES = 64 << 10
"""Pieces from this size on are sent from where they are; smaller ones are gathered into one frame."""


class Write(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    """Header of a message; the pieces' bytes follow, in one frame or in one frame each. `offsets` (in the
    owner's pool) and `num_bytes` are little-endian int64."""

    number: int
    offsets: bytes
    num_bytes: bytes


class Read(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """Asks for pieces of the owner's pool; the fields are those of `Write`."""

    number: int
    offsets: bytes
    num_bytes: bytes


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The owner carried a message out. After a `Read` the bytes follow, framed as those of a `Write`."""

    number: int


def pieces_of(request: Write | Read) -> tuple[Int64, Int64]:
    """Offsets and sizes in the owner's pool. Raises `ValueError`."""
    offsets = np.frombuffer(request.offsets, dtype="<i8")
    num_bytes = np.frombuffer(request.num_bytes, dtype="<i8")
    if len(offsets) != len(num_bytes):
        raise ValueError(f"{len(offsets)} offsets for {len(num_bytes)} pieces")
    return offsets, num_bytes


def to_frames(memory: Bytes, offsets: Int64, num_bytes: Int64) -> list[Bytes]:
    """The pieces as frames; big ones are not copied."""
    if num_bytes.sum() < _MIN_DIRECT_BYTES * len(num_bytes):
        return [gather(memory, offsets, num_bytes)]
    pieces = zip(offsets.tolist(), num_bytes.tolist(), strict=True)
    return [memory[start : start + size] for start, size in pieces]


Place = Callable[[Bytes, Int64, Int64], None]
"""Puts a payload's pieces, which lie one after the other, at offsets of a pool."""


def from_frames(frames: Sequence[memoryview], offsets: Int64, num_bytes: Int64, place: Place) -> None:
    """The inverse of `to_frames`. Raises `ValueError` where the frames do not hold the pieces; nothing has
    changed then."""
    payload = [np.frombuffer(frame, dtype=np.uint8) for frame in frames]
    sizes = [int(num_bytes.sum())] if len(payload) == 1 else num_bytes.tolist()
    if [len(frame) for frame in payload] != sizes:
        raise ValueError(f"{[len(frame) for frame in payload]} bytes sent for pieces of {sizes}")
    if len(payload) == 1:
        place(payload[0], offsets, num_bytes)
        return
    for index, frame in enumerate(payload):
        place(frame, offsets[index : index + 1], num_bytes[index : index + 1])


def into(memory: Bytes) -> Place:
    """Puts pieces into host memory."""
    return lambda payload, offsets, num_bytes: scatter(payload, offsets, num_bytes, memory)
