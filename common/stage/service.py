"""The process around a stage, the same for prompt and token pipelines: membership, epochs, the step loop.

A stage registers, waits until the leading router publishes its pipeline with this incarnation in it, and runs
that epoch until a newer one appears. Stage 0 drives: it forms steps, the others follow them in order.
"""

from __future__ import annotations

import abc
import asyncio
import functools
import gc
import logging
import time
from typing import Any, NamedTuple

import msgspec
import torch

from common import messages
from common.channel import Inbox
from common.etcd.client import EtcdClient
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
from common.messages import Drawn, PipelineReady, StageReady, StatsQuery, StatsReply, Step, StepDone, Stop
from common.model.kv_layout import fitting_layout
from common.model.loader import load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec
from common.peers import Peers, beat
from common.process import own_incarnation
from common.stage.compute import ComputeThread
from common.stage.options import StageOptions
from common.stage.setup import stage_record
from common.stage.step_clock import StepClock
from common.stage.worker import CloseHook, LayerHook, StageWorker, StepOutput

logger = logging.getLogger(__name__)


class Sender(NamedTuple):
    """Whom a message came from."""

    name: str
    incarnation: str


class StageService(abc.ABC):
    """One stage process. Subclasses say what a prompt or a token stage does around its steps."""

    def __init__(self, options: StageOptions, spec: ModelSpec) -> None:
        self.options = options
        self.spec = spec
        self.epoch = 0
        self.incarnation = own_incarnation()
        self.peers = Peers(f"{options.name}.{self.incarnation}")
        self.members: dict[str, MemberRecord] = {}
        self.records: dict[str, PipelineRecord] = {}
        self.tasks: asyncio.TaskGroup
        self.pool: KvPool
        self.inbox: Inbox
        self.compute: ComputeThread
        self.worker: StageWorker
        self.loop: asyncio.AbstractEventLoop
        self.record: PipelineRecord | None = None
        self._stages_ready: dict[int, dict[int, int]] = {}
        self._members_known = asyncio.Event()
        self._clock = StepClock()
        self._monitor = LoopMonitor()
        self._counters = {"refused_frames": 0, "bad_frames": 0, "steps": 0, "tokens": 0}
        self._stop: asyncio.Event
        self._crash: asyncio.Future[None]
        self._runner: StageRunner

    # ------------------------------------------------------------ what a role adds

    def new_worker(self) -> StageWorker:
        """A worker with an empty table for a new epoch."""
        return self.make_worker()

    @abc.abstractmethod
    def new_driver(self, epoch: int, num_blocks: int) -> None:
        """All stages run `epoch`: start scheduling over `num_blocks` blocks."""

    @abc.abstractmethod
    def end_driver(self) -> None:
        """This process is no longer part of its pipeline: nothing is scheduled any more."""

    @abc.abstractmethod
    def next_step(self) -> Step | None:
        """What to run next (stage 0 only)."""

    @abc.abstractmethod
    def step_done(self, step: int, drawn: list[Drawn]) -> None:
        """A step came out of the last stage (stage 0 only)."""

    @abc.abstractmethod
    def handle(self, sender: Sender, message: messages.StageInboxMessage) -> None:
        """Any message that is not about steps and stages."""

    @abc.abstractmethod
    def role_stats(self) -> dict[str, Any]:
        """Figures for `status`, at least kv_blocks."""

    async def member_joined(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is there, and connected."""

    async def member_lost(self, record: MemberRecord) -> None:  # noqa: B027
        """An incarnation of a member is gone."""

    async def quiesce(self) -> None:  # noqa: B027
        """Returns when nothing that this process has begun outside of its steps reads or writes any pool any more."""

    async def open_pool(self) -> dict[str, str]:
        """Called once the pool exists; returns details to register under."""
        return {}

    async def close_pool(self) -> None:  # noqa: B027 - a role may have nothing to add
        """Called before the pool is closed."""

    async def pipeline_published(self, record: PipelineRecord) -> None:  # noqa: B027
        """Any pipeline got a new record."""

    # ------------------------------------------------------------ life

    async def serve(self, stop: asyncio.Event) -> None:
        """Loads the layers, registers and works until `stop` is set. Raises `ConfigurationError`."""
        self.loop = asyncio.get_running_loop()
        self._stop = stop
        self._crash = self.loop.create_future()
        self.compute = ComputeThread(self.loop, self._on_crash)
        self.inbox = await Inbox.bind(f"tcp://{self.options.host}:*", self._on_frames)
        self._runner = await asyncio.to_thread(self._load)
        details = await self.open_pool()
        # what is loaded stays: keep it out of every later collection
        gc.collect()
        gc.freeze()
        try:
            async with (
                EtcdClient(self.options.etcd) as etcd,
                Membership(etcd, self.options.cluster) as membership,
            ):
                await membership.register(stage_record(self.options, self.incarnation, self.inbox.endpoint, details))
                async with asyncio.TaskGroup() as self.tasks:
                    await self._attend(membership, stop)
        finally:
            self.inbox.close()
            self.peers.close()
            # not on the event loop: what runs may be waiting for it
            await asyncio.to_thread(self.compute.close)
            await self.close_pool()
            self.pool.close()

    def _load(self) -> StageRunner:
        options = self.options
        torch.set_num_threads(options.num_threads)
        started_s = time.monotonic()
        model = load_stage(self.spec, options.layers, options.device)
        layout = fitting_layout(self.spec, options.layers, options.block_size, options.kv_memory_bytes)
        self.pool = KvPool.create(layout, options.device, options.name)
        logger.info(
            "layers %d:%d of %s loaded in %.1f s; %d KV blocks of %d tokens",
            *options.layers,
            self.spec.name,
            time.monotonic() - started_s,
            layout.num_blocks,
            layout.block_size,
        )
        return StageRunner(model, self.pool)

    async def _attend(self, membership: Membership, stop: asyncio.Event) -> None:
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
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in [*tasks, waiting]:
            task.cancel()
        if self._crash.done():
            self._crash.result()

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
                    if self._waits_for_us(record):
                        self._report_ready(record.name)
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
            on_layer=on_layer,
            on_close=on_close,
        )

    # ------------------------------------------------------------ epochs

    async def _watch_pipelines(self, membership: Membership) -> None:
        # a driver must know which stores there were before its epoch
        await self._members_known.wait()
        async for record in membership.watch_pipelines():
            # its members may become known to us only later
            for stage in record.stages:
                await self.peers.connect(stage.name, stage.endpoint)
            self.records[record.pipeline] = record
            if record.pipeline == self.options.pipeline and record.epoch > self.epoch:
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
        idle = self.loop.create_future()
        self.compute.submit(lambda: None, idle.set_result)
        await idle
        # ... then nothing that steps have begun
        await self.quiesce()
        self._report_stage_ready(record)

    def _report_stage_ready(self, record: PipelineRecord) -> None:
        if self.epoch != record.epoch:
            return
        ready = StageReady(record.epoch, self.options.stage_index, self.pool.layout.num_blocks)
        if self.options.is_driver:
            self._stage_ready(ready)
        else:
            self.peers.send(record.stages[0].name, ready)

    def _stand_by(self, record: PipelineRecord) -> None:
        """Another process has this place. Whatever still arrives for us is of an epoch that is over."""
        if self.record is not None:
            logger.info("replaced by %s in epoch %d", record.stages[self.options.stage_index].name, record.epoch)
        self.epoch = record.epoch
        self.record = None
        self._stages_ready.clear()
        self.worker = self.new_worker()
        self.end_driver()

    def _stage_ready(self, ready: StageReady) -> None:
        blocks = self._stages_ready.setdefault(ready.epoch, {})
        blocks[ready.stage_index] = ready.num_blocks
        # a follower may see the new epoch before we do: its report waits for us
        if ready.epoch != self.epoch or len(blocks) < self.options.num_stages:
            return
        self._stages_ready = {epoch: of for epoch, of in self._stages_ready.items() if epoch >= self.epoch}
        self.new_driver(self.epoch, min(blocks.values()))
        for member in self.members.values():
            if self._waits_for_us(member):
                self._report_ready(member.name)

    def _waits_for_us(self, member: MemberRecord) -> bool:
        """Routers place work on pipelines that are ready; token drivers send prompts to them."""
        is_token_driver = member.role == "token_stage" and member.stage_index == 0
        return member.role == "router" or (self.options.role == "prompt_stage" and is_token_driver)

    def _report_ready(self, name: str) -> None:
        blocks = self._stages_ready.get(self.epoch, {})
        if self.options.is_driver and len(blocks) == self.options.num_stages:
            capacity = min(blocks.values()) * self.options.block_size
            self.peers.send(name, PipelineReady(self.options.pipeline, self.epoch, capacity))

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
                    self._finish(message.step, message.drawn)
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
        stats = {"loop": self._monitor.figures(), **self.role_stats()}
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
        if not self.options.is_last:
            following = self.record.stages[self.options.stage_index + 1]
            self.peers.send(following.name, step, output.hidden)
        elif self.options.is_driver:
            self._finish(step.step, output.drawn)
        else:
            self.peers.send(self.record.stages[0].name, StepDone(step.epoch, step.step, output.drawn))

    def _finish(self, step: int, drawn: list[Drawn]) -> None:
        self.step_done(step, drawn)
        self.pump()
