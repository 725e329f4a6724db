"""A process among the others: where they reach it, and the lease on which it lives for them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from common.channel import Inbox
from common.etcd.client import EtcdClient
from common.membership import Membership
from common.peers import Peers
from common.service import ServiceOptions


class Presence(NamedTuple):
    """What a process has while it is there for others, once it registers; `endpoint` is where they reach it."""

    endpoint: str
    etcd: EtcdClient
    membership: Membership


@contextlib.asynccontextmanager
async def present(
    options: ServiceOptions, peers: Peers, receive: Callable[[bytes, list[memoryview]], None]
) -> AsyncGenerator[Presence, None]:
    """Use as `async with`: `receive(peer, frames)` gets what others send. At the end this process is reached no more,
    and reaches nobody through `peers`. Raises what `Membership` raises."""
    inbox = await Inbox.bind(f"tcp://{options.host}:*", receive)
    try:
        async with EtcdClient(options.etcd) as etcd, Membership(etcd, options.cluster) as membership:
            yield Presence(inbox.endpoint, etcd, membership)
    finally:
        inbox.close()
        peers.close()
