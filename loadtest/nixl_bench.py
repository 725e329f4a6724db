"""What the transfer library does by itself, to set beside the link that is built on it."""

from __future__ import annotations

import time

import numpy as np

from common.kv.geometry import CopyPlan
from common.kv.nixl_agent import initiator
from common.kv.offer import NixlMemory
from common.kv.pool import KvPool


def bare_writes(pool: KvPool, theirs: NixlMemory, num_bytes: int, num_rounds: int) -> list[float]:
    """Seconds of each of `num_rounds` writes of one contiguous piece: started and polled without a pause, on this
    thread. `theirs` is `Welcome.nixl` of an owner. Raises `LinkLost`."""
    agent = initiator()
    peer, own = agent.add_peer(theirs.metadata), agent.register(pool.arena)
    plan = CopyPlan(np.array([0]), np.array([0]), np.array([num_bytes]))
    taken_s = []
    try:
        for _ in range(num_rounds):
            started_s = time.perf_counter()
            transfer = agent.start(peer, own, theirs, plan, is_write=True)
            while not agent.is_over(transfer):
                pass
            taken_s.append(time.perf_counter() - started_s)
    finally:
        agent.unregister(own)
        agent.remove_peer(peer)
    return taken_s
