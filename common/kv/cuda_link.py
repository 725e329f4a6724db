"""The link for a pool on a GPU of this host: the writer opens the owner's memory and lets the GPU copy, on a stream of
its own."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from common.kv.copies import check_plan
from common.kv.cuda_driver import OpenedMemory
from common.kv.device_copies import copy_on_device
from common.kv.errors import LinkLost, LinkRefused, LinkTimeout
from common.kv.fence import Authority
from common.kv.geometry import CopyPlan
from common.kv.memory_door import Entrance, Watch, ended, enter, entered, owner_pid
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.staging import mark_work, new_stream

logger = logging.getLogger(__name__)


class CudaIpcLink:
    """The writer's side. Our own pool may be on any GPU, or in host memory."""

    name = "cuda_ipc"

    def __init__(self, offer: GrantOffer, entrance: Entrance, memory: OpenedMemory, timeout_s: float) -> None:
        self._offer = offer
        self._memory = memory
        self._timeout_s = timeout_s
        self._stream = new_stream(memory.tensor.device)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-cuda")
        self._copies: set[Future[None]] = set()
        self._owner = Watch(entrance.connection, offer.name, self._copies)

    @classmethod
    async def open(cls, offer: GrantOffer, pool: KvPool, timeout_s: float, authority: Authority) -> CudaIpcLink:
        """Raises `ConnectionRefusedError` where nobody listens, the owner is this very process or its memory cannot be
        opened; `LinkRefused`, `LinkTimeout` or `LinkLost`."""
        entrance, memory = await entered(lambda: _enter(offer, pool, timeout_s, authority), _abandon)
        return cls(offer, entrance, memory, timeout_s)

    @property
    def is_over(self) -> bool:
        """See `Link.is_over`."""
        return not self._owner.is_open

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        """See `Link.write`; what was given to the current stream of the source's device is waited for."""
        self._owner.check()
        check_plan(plan, source.layout.total_bytes, self._offer.layout.total_bytes)
        await self._copy(plan, source.arena, self._memory.tensor, is_write=True)

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        """See `Link.read`; also into a pool on a GPU."""
        self._owner.check()
        check_plan(plan, self._offer.layout.total_bytes, destination.layout.total_bytes)
        await self._copy(plan, self._memory.tensor, destination.arena, is_write=False)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        self._owner.close()
        await ended(self._copies)
        self._memory.close()
        self._executor.shutdown(wait=False)

    async def _copy(self, plan: CopyPlan, source: torch.Tensor, destination: torch.Tensor, *, is_write: bool) -> None:
        before = [mark_work(one.device) for one in (source, destination)]

        def work() -> None:
            with torch.cuda.stream(self._stream):
                for event in before:
                    if event is not None:
                        self._stream.wait_event(event)
                copy_on_device(plan, source, destination)
            self._stream.synchronize()

        copy = self._executor.submit(work)
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(asyncio.wrap_future(copy))
        except TimeoutError:
            is_running = not copy.cancel()
            message = f"the GPU did not copy to or from {self._offer.name} within {self._timeout_s} s"
            raise LinkTimeout(message, may_still_write=is_running and is_write) from None
        except asyncio.CancelledError:
            if not copy.cancel():
                await ended([copy])
            raise
        except RuntimeError as error:  # what PyTorch makes of an error of the GPU
            raise LinkLost(f"the GPU did not copy to or from {self._offer.name}: {error}") from error
        self._owner.check()


def _enter(offer: GrantOffer, pool: KvPool, timeout_s: float, authority: Authority) -> tuple[Entrance, OpenedMemory]:
    """The handshake, and the opening of the owner's memory; blocks."""
    entrance = enter(offer, pool, CudaIpcLink.name, timeout_s, authority)
    try:
        if owner_pid(entrance.connection) == os.getpid():
            raise ConnectionRefusedError("a process cannot open its own GPU memory a second time")
        if entrance.welcome.cuda is None:
            raise LinkRefused(f"{offer.name} offered {pool.name} GPU memory, but sent none")
        try:
            return entrance, OpenedMemory(entrance.welcome.cuda, offer.layout.total_bytes)
        except LinkLost as error:
            # in some containers processes cannot share GPU memory: then another link serves
            logger.warning("the GPU memory of %s cannot be opened: %s", offer.name, error)
            raise ConnectionRefusedError(str(error)) from error
    except BaseException:
        entrance.close()
        raise


def _abandon(opened: tuple[Entrance, OpenedMemory]) -> None:
    entrance, memory = opened
    entrance.close()
    memory.close()
