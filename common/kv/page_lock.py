"""Host memory that a GPU can reach: copies run at the link's full speed, beside the compute, and kernels gather from
it."""

from __future__ import annotations

import logging

import torch

from common.kv.cuda_driver import device_bytes, lock_pages, unlock_pages
from common.kv.errors import LinkLost
from common.kv.pool import KvPool

logger = logging.getLogger(__name__)


class PageLock:
    """A host pool's pages, locked for a GPU until `close`; where that cannot be, copies are slow, and the log says
    so."""

    def __init__(self, pool: KvPool, device: torch.device) -> None:
        self.seen: torch.Tensor | None = None
        """The pool's bytes as a tensor of the device, uint8 [total_bytes]; None where it cannot reach them."""
        self._index = device.index
        self._address = 0
        try:
            there = lock_pages(pool.address, pool.total_bytes, device.index)
        except LinkLost as failure:
            logger.warning("the pages of %s cannot be locked, so swapping will be slow: %s", pool.name, failure)
            return
        self._address = pool.address
        try:
            self.seen = device_bytes(there, pool.total_bytes, device)
        except RuntimeError as failure:
            logger.warning("a GPU cannot reach the pages of %s: swapping will be slower: %s", pool.name, failure)

    def close(self) -> None:
        """Nothing may be copying any more. Call it before the pool is closed. Idempotent."""
        self.seen = None
        if self._address:
            try:
                unlock_pages(self._address, self._index)
            except LinkLost as failure:
                logger.warning("locked pages: %s", failure)
            self._address = 0
