"""Host memory that a GPU can reach: copies run at the link's full speed, beside the compute, and kernels gather from
it."""

from __future__ import annotations

import logging

import torch

from common.kv.cuda_driver import device_bytes
from common.kv.pool import KvPool

logger = logging.getLogger(__name__)


class PageLock:
    """A host pool's pages, locked for a GPU until `close`; where that cannot be, copies are slow, and the log says
    so."""

    def __init__(self, pool: KvPool, device: torch.device) -> None:
        self._memory: torch.Tensor | None = pool.arena
        self.seen: torch.Tensor | None = None
        """The pool's bytes as a tensor of the device, uint8 [total_bytes]; None where it cannot reach them."""
        error = int(torch.cuda.cudart().cudaHostRegister(pool.arena.data_ptr(), pool.layout.total_bytes, 0))  # type: ignore[no-untyped-call]
        if error:
            self._memory = None
            logger.warning("the pages of %s cannot be locked (CUDA error %d): swapping will be slow", pool.name, error)
            return
        # where addresses are unified, and they are on every 64-bit Linux, the GPU's address is the host's
        try:
            self.seen = device_bytes(pool.arena.data_ptr(), pool.layout.total_bytes, device)
        except RuntimeError as failure:
            logger.warning("a GPU cannot reach the pages of %s: swapping will be slower: %s", pool.name, failure)

    def close(self) -> None:
        """Nothing may be copying any more. Call it before the pool is closed. Idempotent."""
        self.seen = None
        if self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
            self._memory = None
