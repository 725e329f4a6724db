"""Copies and digests in C, many pieces in one call without the interpreter lock. Without a compiler numpy does it."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.c_library import build_library

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

BIG_COPY_BYTES = 4 << 20
"""From here on a copy goes past the processor's caches, which would read the destination first."""
_P, _N = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "copy_pieces": [_P, _N, _P, _N, _P, _P, _P, _N, ctypes.c_int],
    "digest_slots": [_P, _N, _N, _N, _N, _P, _N, _N, _P, _N, _P],
}

logger = logging.getLogger(__name__)


class Native:
    """The library. Raises `ValueError`, and has touched nothing, where a piece would leave its memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library = library

    def copy(
        self,
        source: Bytes,
        from_offsets: Int64,
        destination: Bytes,
        to_offsets: Int64,
        sizes: Int64,
        *,
        is_big: bool | None = None,
    ) -> None:
        """`sizes[i]` bytes from `from_offsets[i]` to `to_offsets[i]`, for all i. `is_big`: past the processor's caches;
        None: from `BIG_COPY_BYTES` on."""
        if not destination.flags.writeable:
            raise ValueError("the destination of a copy is read-only")
        if not len(from_offsets) == len(to_offsets) == len(sizes):
            raise ValueError(f"{len(from_offsets)} and {len(to_offsets)} offsets for {len(sizes)} pieces")
        tables = [np.ascontiguousarray(table, dtype=np.int64) for table in (from_offsets, to_offsets, sizes)]
        if is_big is None:
            is_big = int(sizes.sum()) >= BIG_COPY_BYTES
        are_within = self._library.copy_pieces(
            _address(destination), len(destination), _address(source), len(source), *map(_address, tables),
            len(sizes), is_big,
        )  # fmt: skip
        if not are_within:
            raise ValueError(f"pieces do not lie within {len(source)} and {len(destination)} bytes")

    def digest(
        self, words: Words, planes: tuple[int, int], slots: Int64, columns: tuple[int, int], factors: Words
    ) -> Words:
        """words [plane][slot][word]: of some planes and slots the columns times `factors`, summed up:
        [plane][slot]."""
        slots = np.ascontiguousarray(slots, dtype=np.int64)
        digests = np.empty((planes[1] - planes[0], len(slots)), dtype=np.uint64)
        _, num_slots, slot_words = words.shape
        are_within = 0 <= planes[0] <= planes[1] <= len(words) and 0 <= columns[0] <= columns[1] <= slot_words
        if not are_within or len(factors) < columns[1] - columns[0] or not self._library.digest_slots(
            _address(words), num_slots, slot_words, planes[0], len(digests), _address(slots), len(slots), columns[0],
            _address(factors), columns[1] - columns[0], _address(digests),
        ):  # fmt: skip
            raise ValueError(f"slots, planes {planes} or columns {columns} do not lie within {words.shape}")
        return digests


@functools.cache
def load_native() -> Native | None:
    """None where it cannot be built."""
    try:
        return Native(ctypes.CDLL(str(build_library(Path(__file__).with_name("pieces.c"), ["-Wno-psabi"], []))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no native copies, so KV moves slower: %s", error)
        return None


def _address(array: npt.NDArray[np.generic]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("memory with gaps")
    address: int = array.__array_interface__["data"][0]
    return address
