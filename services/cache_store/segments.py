"""How a replica lies on disk (pure): in segments, files of their own that follow on one another.

A replica grows by a few tokens at a time. Each time a new segment takes up the newest ones before it that are not
larger than what has come since, as a binary counter carries: n tokens are in about log2(n) files, and each was written
about log2(n) times. The larger segment replaces the file of the one that it begins with, so whatever is read after a
crash is a chain of whole segments; files that it has taken up, or that belong to other text, do not continue the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from common.kv.checksum import Digests, hash_tokens
from common.kv.token_ids import ID_BYTES

MAX_SEGMENT_TOKENS = 1024


class SegmentNote(msgspec.Struct, frozen=True, array_like=True):
    """Goes with the KV of tokens from `start` on: their ids (packed int32), the hash of all ids before, and their
    digests as they were received, little-endian uint64 [plane][token]."""

    start: int
    token_ids: bytes
    hash_before: bytes
    digests: bytes

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // ID_BYTES

    def digest_array(self) -> Digests:
        """uint64 [plane][token]. Raises `ValueError` where they do not fit the tokens."""
        return np.frombuffer(self.digests, dtype="<u8").astype(np.uint64).reshape(-1, self.num_tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) are in a file. `token_hash` is that of all ids up to `end`."""

    start: int
    end: int
    token_hash: bytes


def new_note(start: int, token_ids: bytes, digests: Digests) -> SegmentNote:
    """`token_ids` are those from token 0 to the segment's end, `digests` those of its own tokens."""
    cut = start * ID_BYTES
    return SegmentNote(start, token_ids[cut:], hash_tokens(token_ids[:cut]), digests.astype("<u8").tobytes())


def segment_name(key: str, start: int) -> str:
    """The file's key."""
    return f"{key}#{start}"


def sequence_key(name: str) -> str:
    """Inverse of `segment_name`, without the start."""
    return name.rpartition("#")[0]


def chain(notes: Iterable[SegmentNote]) -> tuple[list[Segment], bytes]:
    """The segments that follow on one another from token 0, and their token ids."""
    segments: list[Segment] = []
    token_ids = b""
    for note in sorted(notes, key=lambda note: note.start):
        num_tokens = len(token_ids) // ID_BYTES
        if note.start == num_tokens and note.hash_before == hash_tokens(token_ids):
            token_ids += note.token_ids
            segments.append(Segment(note.start, num_tokens + note.num_tokens, hash_tokens(token_ids)))
    return segments, token_ids


def agreeing(segments: Sequence[Segment], token_ids: bytes) -> list[Segment]:
    """As many of a chain as hold the KV of these ids."""
    found: list[Segment] = []
    running = hashlib.blake2b(digest_size=16)  # as `hash_tokens`, but once over all ids
    for segment in segments:
        if segment.end * ID_BYTES > len(token_ids):
            break
        running.update(token_ids[segment.start * ID_BYTES : segment.end * ID_BYTES])
        if segment.token_hash != running.digest():
            break
        found.append(segment)
    return found


def next_segment(segments: Sequence[Segment], num_tokens: int) -> tuple[int, int]:
    """[start, end) of the segment to write behind, or over the last of, a chain shorter than `num_tokens`."""
    start = durable = segments[-1].end if segments else 0
    end = min(num_tokens, durable + MAX_SEGMENT_TOKENS)
    for last in reversed(segments):
        if last.end - last.start > end - start or end - last.start > MAX_SEGMENT_TOKENS:
            break
        start = last.start
    return start, end
