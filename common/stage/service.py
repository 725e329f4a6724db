"""The process around a stage, the same for prompt and token pipelines: membership, epochs, the step loop.

A stage registers, waits until the leading router publishes its pipeline with this incarnation in it, and runs
that epoch until a newer one appears. Stage 0 drives: it forms steps, the others follow them in order.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
import torch

from common import messages
from common.channel import Inbox
from common.etcd.client import EtcdClient
from common.fault_hooks import STUCK_STEP, install_fault_hook, stall
from common.kv.pool import KvPool
from common.loop_monitor import LoopMonitor
from common.membership import (
    MemberChanged,
    MemberJoined,
    MemberLost,
    MemberRecord,
    Membership,
    PipelineRecord,
    SnapshotEnd,
)
from common.messages import PipelineReady, StageReady, StatsQuery, StatsReply, Step, StepDone, Stop, SwapFigures
from common.model.loader import load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec
from common.peers import Peers, beat
from common.process import later_incarnation, own_incarnation
from common.stage.compute import ComputeThread
from common.stage.life import StageLife
from common.stage.options import StageOptions
from common.stage.readiness import Readiness
from common.stage.role import Sender, StageRole
from common.stage.setup import stage_record
from common.stage.step_clock import StepClock
from common.stage.tiers import Tiers
from common.stage.warm_up import warm_up_on
from common.stage.worker import CloseHook, LayerHook, StageWorker, StepOutput
from common.succession import is_retired

logger = logging.getLogger(__name__)


class StageService(StageRole):
    """One stage process. Subclasses say what a prompt or a token stage does around its steps."""

    def __init__(self, options: StageOptions, spec: ModelSpec, life: StageLife) -> None:
        self.options = options
        self.spec = spec
        self.epoch = 0
        self.incarnation = later_incarnation(own_incarnation(), life.num_changes)
        self.peers = Peers(f"{options.name}.{self.incarnation}")
        self.members: dict[str, MemberRecord] = {}
        self.records: dict[str, PipelineRecord] = {}
        self.tasks: asyncio.TaskGroup
        self.pool: KvPool
        self.tiers: Tiers
        self.inbox: Inbox
        self.compute: ComputeThread
        self.worker: StageWorker
        self.loop: asyncio.AbstractEventLoop
        self.record: PipelineRecord | None = None
        self._ready = Readiness(options.num_stages)
        self._members_known = asyncio.Event()
        self._clock = StepClock()
        self._monitor = LoopMonitor()
        self._counters = {"refused_frames": 0, "bad_frames": 0, "steps": 0, "tokens": 0}
        self._background: set[asyncio.Task[None]] = set()
        self._stop: asyncio.Event
        self._crash: asyncio.Future[None]
        self._over: asyncio.Future[PipelineRecord]  # our pipeline's last record
        self._life = life
        self._runner: StageRunner

    def new_worker(self) -> StageWorker:
        """A worker with an empty table for a new epoch."""
        return self.make_worker()

    # ------------------------------------------------------------ life

    async def serve(self, stop: asyncio.Event) -> bool:
        """Loads the layers, registers and works until `stop` is set (False), or until this stage is to go on in its
        other role (True). Raises `ConfigurationError`."""
        self.loop = asyncio.get_running_loop()
        self._stop = stop
        self._crash, self._over = self.loop.create_future(), self.loop.create_future()
        self.compute = ComputeThread(self.loop, self._on_crash)
        install_fault_hook(self.loop, STUCK_STEP, lambda: self.compute.submit(stall, lambda _: None))
        self.inbox = await Inbox.bind(f"tcp://{self.options.host}:*", self._on_frames)
        self._runner = await asyncio.to_thread(self._load)
        if self.options.device != "cpu":
            await warm_up_on(self.compute, self._crash, self._runner, self.tiers.compute_pool, self.spec, self.options)
        details = await self.open_pool()
        if not self._life.num_changes:
            # what is loaded stays: keep it out of every later collection
            gc.collect()
            gc.freeze()
        try:
            async with (
                EtcdClient(self.options.etcd) as etcd,
                Membership(etcd, self.options.cluster) as membership,
            ):
                if is_retired(self.options.pipeline, await membership.pipelines()):
                    return True
                await membership.register(stage_record(self.options, self.incarnation, self.inbox.endpoint, details))
                async with asyncio.TaskGroup() as self.tasks:
                    return await self._attend(membership, stop)
        finally:
            self.inbox.close()
            self.peers.close()
            # not on the event loop: what runs may be waiting for it
            await asyncio.to_thread(self.compute.close)
            await self.close_pool()
            self.tiers.close()

    def _load(self) -> StageRunner:
        options = self.options
        torch.set_num_threads(options.num_threads)
        started_s = time.monotonic()
        if self._life.model is None:
            self._life.model = load_stage(self.spec, options.layers, options.device)
        self.tiers = Tiers(options, self.spec)
        self.pool, layout = self.tiers.pool, self.tiers.pool.layout
        logger.info(
            "layers %d:%d of %s loaded in %.1f s; %d KV blocks of %d tokens",
            *options.layers, self.spec.name, time.monotonic() - started_s, layout.num_blocks, layout.block_size,
        )  # fmt: skip
        return StageRunner(self._life.model, self.tiers.compute_pool)

    async def _attend(self, membership: Membership, stop: asyncio.Event) -> bool:
        tasks = [
            self.tasks.create_task(self._watch_members(membership)),
            self.tasks.create_task(self._watch_pipelines(membership)),
            self.tasks.create_task(self._monitor.watch()),
            self.tasks.create_task(
                beat(self.peers, self._routers, self.options.name, self.incarnation, self._overdue_s)
            ),
        ]
        waiting = self.tasks.create_task(stop.wait())
        ends: list[asyncio.Future[Any]] = [waiting, self._crash]
        await asyncio.wait([*ends, self._over], return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            ending = self.tasks.create_task(self._end(self._over.result()))
            await asyncio.wait([*ends, ending], return_when=asyncio.FIRST_COMPLETED)
            tasks.append(ending)
        for task in [*tasks, waiting, *self._background]:
            task.cancel()
        if self._crash.done():
            self._crash.result()
        return self._over.done() and not stop.is_set()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs while the process serves; its end does not wait for this."""
        task = self.tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _routers(self) -> list[str]:
        return [member.name for member in self.members.values() if member.role == "router"]

    def _overdue_s(self) -> float:
        return self._clock.overdue_s(time.monotonic())

    def _on_crash(self, error: BaseException) -> None:
        if not self._crash.done():
            self._crash.set_exception(error)

    async def _watch_members(self, membership: Membership) -> None:
        async for event in membership.watch():
            match event:
                case MemberJoined(record) | MemberChanged(record):
                    # connected first: whoever is among the members can be sent something
                    await self.peers.connect(record.name, record.endpoint)
                    self.members[record.name] = record
                    self._report_ready(record)
                    if isinstance(event, MemberJoined):
                        await self.member_joined(record)
                case MemberLost(record):
                    self.members.pop(record.name, None)
                    self.peers.drop(record.name, record.endpoint)
                    await self.member_lost(record)
                case SnapshotEnd():
                    self._members_known.set()

    def make_worker(self, on_layer: LayerHook | None = None, on_close: CloseHook | None = None) -> StageWorker:
        """A worker with an empty table."""
        return StageWorker(
            self._runner,
            self.pool,
            hidden_size=self.spec.hidden_size,
            dtype=getattr(torch, self.spec.dtype),
            device=self.options.device,
            is_last=self.options.is_last,
            eos_token_ids=self.spec.eos_token_ids,
            residency=self.tiers.clear_device(),
            on_layer=on_layer,
            on_close=on_close,
        )

    # ------------------------------------------------------------ epochs

    async def _watch_pipelines(self, membership: Membership) -> None:
        # a driver must know which stores there were before its epoch
        await self._members_known.wait()
        async for record in membership.watch_pipelines():
            for stage in record.stages if record.successor is None else ():
                # its members may become known to us only later
                await self.peers.connect(stage.name, stage.endpoint)
                # again, as an older publication may have led us back to an incarnation that was gone
                self._report_ready(stage)
            self.records[record.pipeline] = record
            if is_retired(self.options.pipeline, self.records):
                if not self._over.done():
                    self._over.set_result(self.records[self.options.pipeline])
            elif record.pipeline == self.options.pipeline and record.successor is None and record.epoch > self.epoch:
                await self._activate(record)
            await self.pipeline_published(record)

    async def _activate(self, record: PipelineRecord) -> None:
        own = record.stages[self.options.stage_index]
        if own.incarnation != self.incarnation:
            self._stand_by(record)
            await self.quiesce()
            return
        self.epoch = record.epoch
        self.record = record
        self.worker = self.new_worker()
        logger.info("epoch %d of %s begins", record.epoch, record.pipeline)
        # ready means that nothing of an older epoch reads or writes any pool any more: first no step is running ...
        await self._idle()
        # ... then nothing that steps have begun
        await self.quiesce()
        self._report_stage_ready(record)

    async def _idle(self) -> None:
        """Returns when the steps and the copies of older epochs are over."""
        idle = self.loop.create_future()
        self.compute.submit(lambda: None, idle.set_result)
        await idle
        await asyncio.to_thread(self.tiers.wait_for_copies)

    async def _end(self, record: PipelineRecord) -> None:
        """Returns when this process has nothing to do with its pipeline any more, as of its last record."""
        logger.info("%s is over: this stage goes on in %s", record.pipeline, record.successor)
        self._set_aside(record.epoch)
        await self._idle()
        await self.leave(record)

    def _report_stage_ready(self, record: PipelineRecord) -> None:
        if self.epoch != record.epoch:
            return
        ready = StageReady(
            record.epoch,
            self.options.stage_index,
            self.pool.layout.num_blocks,
            self.tiers.num_device_blocks,
            self.tiers.block_copy_s,
        )
        if self.options.is_driver:
            self._stage_ready(ready)
        else:
            self.peers.send(record.stages[0].name, ready)

    def _stand_by(self, record: PipelineRecord) -> None:
        """Another process has this place. Whatever still arrives for us is of an epoch that is over."""
        if self.record is not None:
            logger.info("replaced by %s in epoch %d", record.stages[self.options.stage_index].name, record.epoch)
        self._set_aside(record.epoch)

    def _set_aside(self, epoch: int) -> None:
        self.epoch = epoch
        self.record = None
        self._ready.forget(epoch)
        self.worker = self.new_worker()
        self.end_driver()

    def _stage_ready(self, ready: StageReady) -> None:
        self._ready.add(ready)
        stages = self._ready.all_of(self.epoch)
        if ready.epoch != self.epoch or stages is None:
            return
        self.new_driver(self.epoch, stages)
        for member in self.members.values():
            self._report_ready(member)

    def _waits_for_us(self, member: MemberRecord) -> bool:
        """Routers place work on pipelines that are ready; token drivers send prompts to them."""
        is_token_driver = member.role == "token_stage" and member.stage_index == 0
        return member.role == "router" or (self.options.role == "prompt_stage" and is_token_driver)

    def _report_ready(self, member: MemberRecord) -> None:
        is_due = self.options.is_driver and self._waits_for_us(member)
        stages = self._ready.all_of(self.epoch) if is_due else None
        if stages is not None:
            capacity = min(stage.num_sequence_blocks for stage in stages) * self.options.block_size
            self.peers.send(member.name, PipelineReady(self.options.pipeline, self.epoch, capacity))

    # ------------------------------------------------------------ messages

    def _on_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        try:
            message = messages.decode_stage_inbox(frames[0])
        except (msgspec.DecodeError, IndexError) as error:
            self._counters["bad_frames"] += 1
            logger.warning("malformed message from %r: %s", peer[:64], error)
            return
        match message:
            case Step():
                self._on_step(message, frames[1] if len(frames) > 1 else None)
            case StepDone():
                if self.accepts(message.epoch):
                    self._finish(message)
            case StageReady():
                self._stage_ready(message)
            case StatsQuery():
                self._answer_stats(message)
            case Stop():
                self._stop.set()
            case _:
                self.handle(Sender(*peer.decode(errors="replace").rpartition(".")[::2]), message)

    def accepts(self, epoch: int) -> bool:
        """The fence: False, and counted, for anything that is not of the current epoch."""
        if epoch == self.epoch:
            return True
        self._counters["refused_frames"] += 1
        return False

    def _answer_stats(self, query: StatsQuery) -> None:
        stats = {"loop": self._monitor.figures(), **self.tiers.stats(), **self.role_stats()}
        stats["counters"] = dict(self._counters) | stats.get("counters", {})
        reply = StatsReply(query.query_id, self.options.name, msgspec.msgpack.encode(stats))
        self.peers.send(query.reply_to, reply)

    def kv_blocks(self) -> dict[str, int]:
        """The pool's blocks; followers count what their table holds."""
        total = self.pool.layout.num_blocks
        held = sum(len(sequence.blocks) for sequence in list(self.worker.sequences.values())) if self.epoch else 0
        return {"total": total, "free": total - held, "quarantined": 0}

    # ------------------------------------------------------------ steps

    def pump(self) -> None:
        """Starts every step that may start now (stage 0 only)."""
        while (step := self.next_step()) is not None:
            self._run(step, None)

    def _on_step(self, step: Step, hidden: memoryview | None) -> None:
        if self.accepts(step.epoch):
            self._run(step, hidden)

    def _run(self, step: Step, hidden: memoryview | None) -> None:
        worker = self.worker
        self._counters["steps"] += 1
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        self._counters["tokens"] += num_tokens
        self._clock.submitted(num_tokens, time.monotonic())

        def execute() -> StepOutput:
            # a worker that was replaced meanwhile must not touch the pool
            return worker.execute(step, hidden) if worker is self.worker else StepOutput(None, [])

        self.compute.submit(execute, functools.partial(self._on_output, step))

    def _on_output(self, step: Step, output: StepOutput) -> None:
        self._clock.done(time.monotonic())
        if step.epoch != self.epoch or self.record is None:
            return
        swap = _slowest(step.swap, output.swap)
        if not self.options.is_last:
            following = self.record.stages[self.options.stage_index + 1]
            self.peers.send(following.name, msgspec.structs.replace(step, swap=swap), output.hidden)
            return
        done = StepDone(step.epoch, step.step, output.drawn, swap)
        if self.options.is_driver:
            self._finish(done)
        else:
            self.peers.send(self.record.stages[0].name, done)

    def _finish(self, done: StepDone) -> None:
        self.step_done(done)
        self.pump()


def _slowest(one: SwapFigures | None, other: SwapFigures | None) -> SwapFigures | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda figures: figures.copy_s)
