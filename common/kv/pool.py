"""The memory behind a layout: one arena per pool, which other processes may be granted."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from common.kv.layout import QUANTISED, PoolLayout
from common.kv.native import load_native

if TYPE_CHECKING:
    # who only keeps and passes on KV does without torch: it costs seconds and hundreds of megabytes
    import torch

Bytes = npt.NDArray[np.uint8]

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_retired: list[object] = []


class KvPool:
    """KV blocks on one device. On CPU the memory is a memfd: it has no name anybody could guess, its size is
    sealed, and it vanishes with its last holder, also after a kill. Where there is no memfd (not Linux) it
    is private."""

    def __init__(self, layout: PoolLayout, arena: torch.Tensor | Bytes, fd: int | None, name: str) -> None:
        self.layout = layout
        self.total_bytes = layout.total_bytes
        self.name = name
        self.fd = fd
        """The arena's memfd; None where the memory cannot be passed to another process."""
        self._arena = arena
        self.address = arena.ctypes.data if isinstance(arena, np.ndarray) else arena.data_ptr()
        """where the arena begins; 0 once it is closed"""
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def create(cls, layout: PoolLayout, device: str = "cpu", name: str = "kv") -> KvPool:
        """A zeroed pool with every page present; `name` shows in /proc. Raises `OSError` or `MemoryError`."""
        if device != "cpu":
            import torch

            zeros = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(zeros.device)  # else the zeros might come after what another stream writes
            return cls(layout, zeros, None, name)
        load_native()  # which may have to be built: not when the first copy is waited for
        fd = create_memfd(name, layout.total_bytes) if sys.platform == "linux" else None
        try:
            arena = np.frombuffer(map_memory(fd, layout.total_bytes), dtype=np.uint8)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        return cls(layout, arena, fd, name)

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def is_host(self) -> bool:
        """Whether numpy can see the memory."""
        return isinstance(self._arena, np.ndarray) or self._arena.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self.arena.device

    @property
    def arena(self) -> torch.Tensor:
        """All bytes of the pool, uint8 [total_bytes]."""
        if isinstance(self._arena, np.ndarray):
            import torch

            return torch.from_numpy(self._arena)
        return self._arena

    @property
    def memory(self) -> Bytes:
        """The arena as numpy sees it, uint8 [total_bytes]. Raises `TypeError` for a device pool."""
        return self._arena if isinstance(self._arena, np.ndarray) else self._arena.numpy()

    def layer(self, local_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the pool's n-th layer, views [num_blocks, block_size, num_kv_heads,
        head_dim]. Raises `TypeError` for a pool of quantised elements."""
        if self._layers is None:
            self._layers = _layer_views(self.arena, self.layout)
        return self._layers[local_layer]

    def seen_as(self, dtype: str) -> KvPool:
        """What a peer is shown of a pool whose spans are converted on their way out; its memory is not laid out so."""
        return KvPool(msgspec.structs.replace(self.layout, dtype=dtype), self._arena, None, self.name)

    def close(self) -> None:
        """Lets go of the memory, which lives on until the last view of it is gone. Idempotent."""
        self._layers = None
        self._arena = np.empty(0, dtype=np.uint8)
        self.address = 0
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def retire(pool: KvPool) -> None:
    """Keeps the pool's memory where it is for the life of this process, though nobody uses it any more: a peer may
    still write to it, and what came to lie there would be overwritten."""
    _retired.append(pool._arena)


def create_memfd(name: str, num_bytes: int) -> int:
    """A memfd whose size nobody can change any more. Raises `OSError`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_memory(fd: int | None, num_bytes: int) -> mmap.mmap:
    """Maps a memfd (None: private memory) with all pages present: a first touch costs ten times a copy, and
    it should not happen inside one."""
    memory = mmap.mmap(-1 if fd is None else fd, num_bytes)
    if not _is_populated(memory, _MADV_POPULATE_WRITE):
        np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 0
    return memory


def map_present_memory(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps a memfd whose pages its owner has made: the kernel maps many at once where they are only to be read, in a
    quarter of the time, and lets us write to them all the same."""
    memory = mmap.mmap(fd, num_bytes)
    if not _is_populated(memory, _MADV_POPULATE_READ):
        np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE].max(initial=0)  # its owner may be writing there
    return memory


def _is_populated(memory: mmap.mmap, advice: int) -> bool:
    """False: the kernel does not know how (before Linux 5.14, and elsewhere); every page has to be touched. It takes
    most of a second a GiB: `mmap.madvise` would keep all other threads, so the event loop, from running meanwhile."""
    if sys.platform != "linux":
        return False
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), advice) == 0)


def _layer_views(arena: torch.Tensor, layout: PoolLayout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    dtype = getattr(torch, layout.dtype, None)
    if layout.dtype in QUANTISED or not isinstance(dtype, torch.dtype):
        raise TypeError(f"nobody computes with a pool of {layout.dtype}")
    shape = (layout.num_layers, 2, layout.num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
    return [(layer[0], layer[1]) for layer in arena.view(dtype).view(shape)]
