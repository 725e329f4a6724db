"""The process around a stage, in one role: it loads, registers, hears who else is there, and ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from common.channel import Inbox
from common.etcd.client import EtcdClient
from common.fault_hooks import STUCK_STEP, install_fault_hook, stall
from common.loop_monitor import LoopMonitor
from common.membership import Membership, PipelineRecord, SnapshotEnd
from common.peers import beat
from common.stage.repeats import REPEAT_S
from common.stage.setup import stage_record
from common.succession import is_retired

if TYPE_CHECKING:
    from common.model.loader import StageModel
    from common.stage.service import StageService


class StageProcess:
    """Serves one stage. `model` is what it has loaded, which outlives the role."""

    def __init__(self, stop: asyncio.Event, model: StageModel | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.monitor = LoopMonitor()
        self.model = model
        self.over: asyncio.Future[PipelineRecord] = self.loop.create_future()
        """the stage's pipeline's last record, once that is known"""
        self._stop = stop
        self._crashed: asyncio.Future[None] = self.loop.create_future()
        self._members_known = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._background: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ for the stage

    def stop(self) -> None:
        """Ends the process in order."""
        self._stop.set()

    def crash(self, error: BaseException) -> None:
        """Ends it with an exception."""
        if not self._crashed.done():
            self._crashed.set_exception(error)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs while the process serves; its end does not wait for this."""
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ------------------------------------------------------------ life

    async def serve(self, stage: StageService) -> bool:
        """Loads the layers, registers and works until `stop` is set (False), or until this stage is to go on in its
        other role (True). Raises `ConfigurationError`."""
        options, engine = stage.options, stage.engine
        install_fault_hook(self.loop, STUCK_STEP, lambda: engine.compute.submit(stall, lambda _: None))
        inbox = await Inbox.bind(f"tcp://{options.host}:*", stage.receive)
        is_first_role = self.model is None
        self.model = await asyncio.to_thread(engine.load, self.model)
        await engine.warm_up(self._crashed)
        details = await stage.open_pool()
        if is_first_role:
            # what is loaded stays: keep it out of every later collection
            gc.collect()
            gc.freeze()
        try:
            async with EtcdClient(options.etcd) as etcd, Membership(etcd, options.cluster) as membership:
                if is_retired(options.pipeline, await membership.pipelines()):
                    return True
                await membership.register(stage_record(options, stage.incarnation, inbox.endpoint, details))
                async with asyncio.TaskGroup() as self._tasks:
                    return await self._attend(membership, stage)
        finally:
            inbox.close()
            stage.peers.close()
            # not on the event loop: what runs may be waiting for it
            await asyncio.to_thread(engine.compute.close)
            await stage.close_pool()
            engine.tiers.close()

    async def _attend(self, membership: Membership, stage: StageService) -> bool:
        tasks: list[asyncio.Task[Any]] = [
            self._tasks.create_task(self._watch_members(membership, stage)),
            self._tasks.create_task(self._watch_pipelines(membership, stage)),
            self._tasks.create_task(self.monitor.watch()),
            self._tasks.create_task(self._beat(membership, stage)),
            self._tasks.create_task(self._remind(stage)),
            stopped := self._tasks.create_task(self._stop.wait()),
        ]
        ends: list[asyncio.Future[Any]] = [stopped, self._crashed]
        await asyncio.wait([*ends, self.over], return_when=asyncio.FIRST_COMPLETED)
        if self.over.done():
            tasks.append(ending := self._tasks.create_task(stage.end(self.over.result())))
            await asyncio.wait([*ends, ending], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, *self._background):
            task.cancel()
        if self._crashed.done():
            self._crashed.result()
        return self.over.done() and not self._stop.is_set()

    async def _beat(self, membership: Membership, stage: StageService) -> None:
        def overdue_s() -> float:
            return stage.overdue_s(hears_of_deaths=membership.standing() is not None)

        await beat(stage.peers, stage.routers, stage.options.name, stage.incarnation, overdue_s)

    async def _remind(self, stage: StageService) -> None:
        while True:
            await asyncio.sleep(REPEAT_S)
            stage.remind()

    async def _watch_members(self, membership: Membership, stage: StageService) -> None:
        async for event in membership.watch():
            if isinstance(event, SnapshotEnd):
                self._members_known.set()
            else:
                await stage.hear_of_member(event)

    async def _watch_pipelines(self, membership: Membership, stage: StageService) -> None:
        # a driver must know which stores there were before its epoch
        await self._members_known.wait()
        async for record in membership.watch_pipelines():
            await stage.hear_of_pipeline(record)
