"""What a token driver tells of itself in `status` (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.token_stage.scheduler import TokenScheduler


def driver_stats(scheduler: TokenScheduler, counts: Mapping[str, int], pulled_bytes: int) -> dict[str, Any]:
    """`counts` are the driver's counters, those of its older epochs included."""
    lag_tokens = scheduler.replication.lag_tokens()
    stats: dict[str, Any] = {
        "kv_blocks": scheduler.kv_blocks(),
        "replication": {
            "lag_tokens": lag_tokens,
            "stores": scheduler.replication.num_stores,
            "pulled_bytes": pulled_bytes,
        },
        "counters": {**counts, "replica_lag_tokens": lag_tokens},
        "sequences": {"running": scheduler.num_running, "waiting": scheduler.num_waiting},
    }
    if scheduler.device is not None:
        stats["swap"] = scheduler.device.describe()
    return stats
