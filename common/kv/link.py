"""The contract of a link, and the choice between links."""

from __future__ import annotations

import asyncio
import logging
import sys
from concurrent.futures import Executor
from typing import Protocol

from common.kv.choice import Capabilities, choose_links
from common.kv.errors import LinkError, LinkLost, LinkRefused, LinkTimeout
from common.kv.fence import Authority
from common.kv.geometry import CopyPlan
from common.kv.offer import PROTOCOL_VERSION, GrantOffer, host_id, misfit
from common.kv.pool import KvPool
from common.kv.shm import ShmLink
from common.kv.zmq_link import ZmqLink

__all__ = ["GrantOffer", "Link", "LinkError", "LinkLost", "LinkRefused", "LinkTimeout", "close_reading", "open_link"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 5.0


class Link(Protocol):
    """A way into somebody else's pool. Several writes and reads may run at once; all calls come from the event
    loop that opened the link. Once a call has ended, in whatever way, nothing of it changes our own
    pool any more."""

    @property
    def name(self) -> str:
        """What `status` shows, one of `choice.LINK_NAMES`."""

    @property
    def is_over(self) -> bool:
        """Closed, or the owner's end has been seen, perhaps while nothing was under way: nothing can be written or read
        any more."""

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """Copies pieces of `source` (host memory) into the owner's pool. When it returns *the bytes are
        there*, and the owner was alive. Raises `ValueError` for a plan that leaves the pool, `LinkTimeout`
        after the link's deadline (a frozen peer never reports an error), `LinkLost` when the peer is gone."""

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """Copies pieces of the owner's pool, at `plan.source_offset`, into `destination` (host memory). When it
        returns all of them are there; what the owner changed meanwhile may be torn, so compare checksums. Raises
        like `write`."""

    async def aclose(self) -> None:
        """After this no write of this link changes the owner's pool any more. Where that cannot be confirmed
        within the deadline it raises a `LinkError` whose `may_still_write` is true: keep the blocks out of
        use."""


async def open_link(
    offer: GrantOffer,
    pool: KvPool,
    *,
    authority: Authority | None = None,
    travels_as: str | None = None,
    executor: Executor | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Link:
    """The best link from `pool` into what is offered (see `choice.choose_links`).

    `timeout_s` is the deadline of the handshake and of every later write. `executor` runs the copies of a
    shared-memory link; without one they run in the calling thread. `travels_as` says which elements will be
    written, where `stream_out` converts them on the way (int8, say). Who writes for a pipeline says under which epochs
    (`authority`), so that the owner can end it with them (`PoolServer.fence`). Raises `LinkRefused` at once, naming
    both sides, where they do not fit; `LinkTimeout`; `LinkLost`.
    """
    if travels_as is not None:
        pool = pool.seen_as(travels_as)
    if offer.protocol != PROTOCOL_VERSION:
        raise LinkRefused(f"{pool.name} speaks KV protocol {PROTOCOL_VERSION}, {offer.name} {offer.protocol}")
    reason = misfit(pool.name, pool.layout, offer.name, offer.layout)
    if reason is not None:
        raise LinkRefused(reason)
    for name in choose_links(await _capabilities(offer), offer)[:-1]:
        try:
            return await _open(name, offer, pool, executor, timeout_s, authority or {})
        except ConnectionRefusedError:
            continue  # gone, or in another network namespace; the next one finds out
    return await ZmqLink.open(offer, pool, timeout_s, authority or {})


async def close_reading(link: Link, name: str) -> None:
    """Closes a link that has only been read through: a failure to confirm the end can harm nobody."""
    try:
        await link.aclose()
    except LinkError as error:
        logger.warning("link to %s: %s", name, error)


async def _capabilities(offer: GrantOffer) -> Capabilities:
    """Those of this process, as far as they matter for this offer. One that has not loaded torch (a store, say) does
    not load it for this; and one that computes on the CPU begins to use CUDA, which takes a while, only for memory of a
    GPU."""
    if "torch" not in sys.modules:
        return Capabilities(host_id(), frozenset(), has_nixl=False)
    from common.kv.cuda_driver import gpu_ids
    from common.kv.nixl_agent import nixl_module

    seen = await asyncio.to_thread(gpu_ids) if offer.gpu_id is not None else []
    return Capabilities(host_id(), frozenset(seen), nixl_module() is not None)


async def _open(
    name: str, offer: GrantOffer, pool: KvPool, executor: Executor | None, timeout_s: float, authority: Authority
) -> Link:
    if name == "cuda_ipc":
        from common.kv.cuda_link import CudaIpcLink

        return await CudaIpcLink.open(offer, pool, timeout_s, authority)
    if name == "nixl":
        from common.kv.nixl_link import NixlLink

        return await NixlLink.open(offer, pool, timeout_s, authority)
    return await ShmLink.open(offer, pool, executor, timeout_s, authority)
