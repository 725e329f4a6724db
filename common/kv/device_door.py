"""What a ZeroMQ door does where the pool is device memory: messages are gathered and scattered by the GPU."""

from __future__ import annotations

import torch

from common.kv.copies import packed
from common.kv.device_copies import copy_on_device
from common.kv.geometry import CopyPlan, Int64
from common.kv.pool import Bytes, KvPool
from common.kv.staging import SideStream


class DeviceDoor:
    """Who reads may count on what steps that are over have written; steps under way are not waited for."""

    def __init__(self, pool: KvPool) -> None:
        # not its memory: this may be there for longer, and the GPU would not get it back
        self._pool = pool
        self._stream = SideStream(pool.device)

    def put(self, payload: Bytes, offsets: Int64, num_bytes: Int64) -> None:
        """Pieces that lie one after the other in `payload` are at `offsets` of the pool when this returns."""
        with self._stream.work():
            # a frame's memory is not writable, which torch would complain about
            arrived = torch.from_numpy(payload.copy()).to(self._pool.device)
            copy_on_device(CopyPlan(packed(num_bytes), offsets, num_bytes), arrived, self._pool.arena)

    def take(self, offsets: Int64, num_bytes: Int64) -> Bytes:
        """The inverse."""
        with self._stream.work():
            gathered = torch.empty(int(num_bytes.sum()), dtype=torch.uint8, device=self._pool.device)
            copy_on_device(CopyPlan(offsets, packed(num_bytes), num_bytes), self._pool.arena, gathered)
            payload: Bytes = gathered.cpu().numpy()
        return payload
