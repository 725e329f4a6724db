"""The KV memory of a stage: one pool, or a host pool with the device as its cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from common.kv.layout import PoolLayout
from common.kv.page_lock import PageLock
from common.kv.pool import KvPool
from common.kv.residency import Residency, probe_s_per_byte
from common.model.kv_layout import fitting_layout
from common.model.spec import ModelSpec
from common.stage.options import StageOptions
from dejavu.errors import ConfigurationError


class Tiers:
    """`pool` is the one whose blocks others know and touch; `compute_pool` the one that layers read and write."""

    def __init__(self, options: StageOptions, spec: ModelSpec) -> None:
        """Raises `ConfigurationError` where the memory holds no block."""
        layout = fitting_layout(spec, options.layers, options.block_size, options.kv_memory_bytes)
        self.compute_pool = _create(layout, options.device, options.name)
        self.pool = self.compute_pool
        self.residency: Residency | None = None
        self.block_copy_s = 0.0
        self._keeps_idle = options.swap != "on"
        self._copier: ThreadPoolExecutor | None = None
        self._lock: PageLock | None = None
        if options.host_tier_bytes:
            layout = fitting_layout(spec, options.layers, options.block_size, options.host_tier_bytes)
            self.pool = KvPool.create(layout, name=f"{options.name}-host")
            if options.device == "cuda":
                self._lock = PageLock(self.pool, self.compute_pool.device)
            self._copier = ThreadPoolExecutor(1, thread_name_prefix="swap")
            s_per_byte = probe_s_per_byte(self.pool, self.compute_pool, host_seen=self._host_seen)
            self.block_copy_s = s_per_byte * layout.bytes_per_block

    @property
    def _host_seen(self) -> torch.Tensor | None:
        return None if self._lock is None else self._lock.seen

    @property
    def num_device_blocks(self) -> int | None:
        """How many blocks the device holds of those of the host pool; None: there is only one pool."""
        return None if self._copier is None else self.compute_pool.layout.num_blocks

    def clear_device(self) -> Residency | None:
        """Nothing lies on the device any more: a new epoch."""
        if self._copier is not None:
            self.residency = Residency(
                self.pool,
                self.compute_pool,
                self._copier,
                keeps_idle=self._keeps_idle,
                host_seen=self._host_seen,
            )
        return self.residency

    def wait_for_copies(self) -> None:
        """Returns when what had begun for an older epoch is over."""
        if self._copier is not None:
            self._copier.submit(lambda: None).result()

    def stats(self) -> dict[str, Any]:
        """The device as `status` shows it."""
        residency = self.residency
        if residency is None:
            return {}
        return {
            "device_kv_blocks": {
                "total": self.compute_pool.layout.num_blocks,
                "resident": residency.num_resident_blocks,
                "peak": residency.peak_blocks,
            },
            "swapped_in_bytes": residency.swapped_in_bytes,
            "swap_waited_s": round(residency.waited_s, 3),
        }

    def close(self) -> None:
        """Ends the copies and lets go of the memory."""
        if self._copier is not None:
            self._copier.shutdown(wait=True, cancel_futures=True)
            self.residency = None
            if self._lock is not None:
                self._lock.close()
            self.compute_pool.close()
        self.pool.close()


def _create(layout: PoolLayout, device: str, name: str) -> KvPool:
    try:
        return KvPool.create(layout, device, name)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"the device has no room for a KV pool of {layout.total_bytes} bytes beside the weights and other stages",
            field="kv_memory",
        ) from error
