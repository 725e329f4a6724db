"""The life of a stage's process: it works in one role, and when its pipeline is over, in the other.

Its weights stay. Its pool does not: others had been let in, and a new one is there in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias

from common.fault_hooks import STUCK_STEP, install_fault_hook, stall
from common.membership import Membership, SnapshotEnd
from common.messages import REPEAT_S
from common.model.loader import StageModel
from common.model.spec import ModelSpec
from common.peers import beat
from common.presence import present
from common.process import later_incarnation, own_incarnation
from common.service import log_as, run_service
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.service import StageService
from common.stage.setup import load_stage_spec, stage_record
from common.succession import is_retired

StageRoles: TypeAlias = Mapping[str, Callable[[StageOptions, ModelSpec, str, StageProcess], StageService]]
"""What a stage is in each role. Only the entry points of the two services know both."""


def run_stage(options: StageOptions, roles: StageRoles) -> int:
    """Runs a stage, in whichever role its pipeline has, until SIGTERM; returns the exit code."""
    return run_service(options.name, lambda stop: _live(options, roles, stop), options.cores)


async def _live(options: StageOptions, roles: StageRoles, stop: asyncio.Event) -> None:
    model: StageModel | None = None
    for num_changes in itertools.count():
        incarnation = later_incarnation(own_incarnation(), num_changes)
        stage = roles[options.role](options, load_stage_spec(options), incarnation, StageProcess(stop))
        model = await _serve(stage, model)
        if model is None:
            return
        options = options.in_other_role()
        log_as(options.name)


async def _serve(stage: StageService, model: StageModel | None) -> StageModel | None:
    """Loads the layers, unless there is a `model` of them, registers and works until the process is to stop (None), or
    until this stage is to go on in its other role (with the model that is returned). Raises `ConfigurationError`."""
    options, engine, process = stage.options, stage.engine, stage.process
    install_fault_hook(process.loop, STUCK_STEP, lambda: engine.compute.submit(stall, lambda _: None))
    loaded = await process.prepare(lambda: engine.load(model))
    await engine.warm_up(process.crashed)
    details = await stage.open()
    if model is None:
        # what is loaded stays: keep it out of every later collection
        gc.collect()
        gc.freeze()
    try:
        async with present(options, stage.peers, stage.receive) as (endpoint, _, membership):
            if is_retired(options.pipeline, await membership.pipelines()):
                return loaded
            await membership.register(stage_record(options, stage.incarnation, endpoint, details))
            return loaded if await process.run(_works(stage, membership), stage.end) else None
    finally:
        # not on the event loop: what runs may be waiting for it
        await asyncio.to_thread(engine.compute.close)
        await stage.close()
        engine.tiers.close()


def _works(stage: StageService, membership: Membership) -> list[Coroutine[Any, Any, None]]:
    def overdue_s() -> float:
        return stage.overdue_s(hears_of_deaths=membership.standing() is not None)

    # a driver must know which stores there were before its epoch
    knows_members = asyncio.Event()
    return [
        _hear_of_members(stage, membership, knows_members),
        _hear_of_pipelines(stage, membership, knows_members),
        beat(stage.peers, stage.routers, stage.options.name, stage.incarnation, overdue_s),
        _remind(stage),
    ]


async def _hear_of_members(stage: StageService, membership: Membership, knows_members: asyncio.Event) -> None:
    async for event in membership.watch():
        if isinstance(event, SnapshotEnd):
            knows_members.set()
        else:
            await stage.hear_of_member(event)


async def _hear_of_pipelines(stage: StageService, membership: Membership, knows_members: asyncio.Event) -> None:
    await knows_members.wait()
    async for record in membership.watch_pipelines():
        await stage.hear_of_pipeline(record)


async def _remind(stage: StageService) -> None:
    while True:
        await asyncio.sleep(REPEAT_S)
        stage.remind()
