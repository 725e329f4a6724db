"""What the transfer library does by itself, to set beside the link that is built on it."""

from __future__ import annotations

import msgspec

from common.kv.geometry import CopyPlan
from common.kv.link import DEFAULT_TIMEOUT_S, GrantOffer, LinkRefused
from common.kv.nixl_agent import initiator
from common.kv.offer import Leave, NixlMemory
from common.kv.pool import KvPool
from common.kv.zmq_connection import ZmqConnection


class BareNixl:
    """Writes as one transfer each, started and polled without a pause on the calling thread; no deadline, no watch."""

    name = "nixl alone"

    def __init__(self, connection: ZmqConnection, pool: KvPool, theirs: NixlMemory) -> None:
        self._connection = connection
        self._theirs = theirs
        self._agent = initiator()
        self._peer, self._own = self._agent.add_peer(theirs.metadata), self._agent.register(pool.arena)

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool) -> BareNixl:
        """Raises `LinkError`."""
        connection = ZmqConnection(offer, DEFAULT_TIMEOUT_S)
        memory = (await connection.enter(pool, "nixl", {})).nixl
        if memory is None:
            raise LinkRefused(f"{offer.name} does not have the transfer library")
        return cls(connection, pool, memory)

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """`source` is the pool that this was opened with. Raises `LinkLost`."""
        transfer = self._agent.start(self._peer, self._own, self._theirs, plan, is_write=True)
        while not self._agent.is_over(transfer):
            pass

    async def aclose(self) -> None:
        self._agent.unregister(self._own)
        self._agent.remove_peer(self._peer)
        await self._connection.send([msgspec.msgpack.encode(Leave())])
        await self._connection.aclose()
