"""What computes in a stage: its layers, its memory, and the thread that runs one step after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from common.messages import StageReady, Step
from common.model.loader import StageModel, load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec
from common.stage.compute import ComputeThread
from common.stage.options import StageOptions
from common.stage.step_clock import StepClock
from common.stage.tiers import Tiers
from common.stage.warm_up import warm_up_on
from common.stage.worker import CloseHook, LayerHook, StageWorker, StepOutput

logger = logging.getLogger(__name__)


class Engine:
    """Of one stage in one role. `load` it before anything else, and have a `worker` for every epoch."""

    def __init__(
        self,
        options: StageOptions,
        spec: ModelSpec,
        loop: asyncio.AbstractEventLoop,
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self.compute = ComputeThread(loop, on_crash)
        self.clock = StepClock()
        self.tiers: Tiers
        self.worker: StageWorker | None = None
        self.counters = {"steps": 0, "tokens": 0}
        self._options = options
        self._spec = spec
        self._loop = loop
        self._runner: StageRunner

    def load(self, model: StageModel | None) -> StageModel:
        """Loads the layers, unless they are given, and makes the pool. Raises `ConfigurationError`."""
        options, started_s = self._options, time.monotonic()
        torch.set_num_threads(options.num_threads)
        if model is None:
            model = load_stage(self._spec, options.layers, options.device)
        self.tiers = Tiers(options, self._spec)
        self._runner = StageRunner(model, self.tiers.compute_pool)
        layout = self.tiers.pool.layout
        logger.info(
            "layers %d:%d of %s loaded in %.1f s; %d KV blocks of %d tokens",
            *options.layers, self._spec.name, time.monotonic() - started_s, layout.num_blocks, layout.block_size,
        )  # fmt: skip
        return model

    async def warm_up(self, crashed: asyncio.Future[None]) -> None:
        """So that the first step takes no longer than others. Raises what `crashed` holds."""
        if self._options.device != "cpu":
            pool = self.tiers.compute_pool
            await warm_up_on(self.compute, crashed, self._runner, pool, self._spec, self._options)

    def new_worker(self, on_layer: LayerHook | None = None, on_close: CloseHook | None = None) -> StageWorker:
        """A worker with an empty table."""
        return StageWorker(
            self._runner,
            self.tiers.pool,
            hidden_size=self._spec.hidden_size,
            dtype=getattr(torch, self._spec.dtype),
            device=self._options.device,
            is_last=self._options.is_last,
            eos_token_ids=self._spec.eos_token_ids,
            residency=self.tiers.clear_device(),
            on_layer=on_layer,
            on_close=on_close,
        )

    def run(self, step: Step, hidden: memoryview | None, on_output: Callable[[Step, StepOutput], None]) -> None:
        """Queues a step for the worker of this epoch; `on_output` is called on the event loop, in the same order."""
        worker = self.worker
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        self.counters["steps"] += 1
        self.counters["tokens"] += num_tokens
        self.clock.submitted(num_tokens, self.compute.clock_s())

        def execute() -> tuple[StepOutput, float]:
            # a worker that was replaced meanwhile must not touch the pool
            if worker is None or worker is not self.worker:
                return StepOutput(None, []), self.compute.clock_s()
            return worker.execute(step, hidden), self.compute.clock_s()

        def deliver(result: tuple[StepOutput, float]) -> None:
            output, finished_s = result
            self.clock.done(finished_s)
            on_output(step, output)

        self.compute.submit(execute, deliver)

    async def idle(self) -> None:
        """Returns when the steps and the copies of older epochs are over."""
        idle = self._loop.create_future()
        self.compute.submit(lambda: None, idle.set_result)
        await idle
        await asyncio.to_thread(self.tiers.wait_for_copies)

    def overdue_s(self) -> float:
        """By how much the running step exceeds what is to be expected; 0: it does not."""
        return self.clock.overdue_s(self.compute.clock_s())

    def ready(self, epoch: int) -> StageReady:
        """What the driver needs to know of this stage's memory."""
        tiers = self.tiers
        num_blocks = tiers.pool.layout.num_blocks
        return StageReady(epoch, self._options.stage_index, num_blocks, tiers.num_device_blocks, tiers.block_copy_s)

    def stats(self) -> dict[str, Any]:
        """For `status`: the pool's blocks, as far as the table knows, and the device as a second tier."""
        total = self.tiers.pool.layout.num_blocks
        sequences = [] if self.worker is None else list(self.worker.sequences.values())
        held = sum(len(sequence.blocks) for sequence in sequences)
        return {"kv_blocks": {"total": total, "free": total - held, "quarantined": 0}, **self.tiers.stats()}
